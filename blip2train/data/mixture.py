"""Weighted datasets -> the order of a run's samples, and what tells one order from another.

Implements the mixture of pre-training sources (paper section 3.4). LAVIS draws the dataset with Python's global
generator in the main process and cannot repeat or resume the sequence.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from blip2train.data.image_file import MAX_PIXELS
from blip2train.data.image_transform import Transform
from blip2train.data.order import DatasetOrder, MixtureOrder
from blip2train.data.shard_reader import file_name
from blip2train.data.shards import Shard, ShardCache, ShardReader, open_shards
from blip2train.data.stored_tokens import StoredTokens
from blip2train.errors import ConfigError, DataError

_CHOICES_AT_ONCE = 1024


@dataclass
class Dataset:
    """One source of a mixture.

    Args:
        name: unique in the mixture; keys the generators, so renaming a dataset changes what is drawn.
        urls: shards, as `shards.expand_urls` takes them.
        transform: training augmentation; `StoredTokens` for shards of a feature cache.
        weight: relative share of samples; weights need not sum to one.
        index: path or url of the `index.json` that counts the records, where it does not lie beside the shards.
        storage_options: how fsspec reaches remote shards, see `remote.Remote`.
    """

    name: str
    urls: str | Sequence[str]
    transform: Transform | StoredTokens
    weight: float = 1.0
    index: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ConfigError(
                f"weight {self.weight} of dataset {self.name}",
                where=f"datasets.{self.name}.weight",
                fix="give a positive number",
            )


@dataclass(frozen=True, slots=True)
class Draw:
    """One position of a stream.

    Args:
        dataset: number of the dataset.
        stream: logical stream.
        number: earlier draws of the stream from the same dataset.
    """

    dataset: int
    stream: int
    number: int


class Mixture:
    """The sample order of a run: the same on every rank and in every worker.

    Args:
        datasets: at least one.
        seed: of the run.
        num_streams: logical streams that the samples are dealt to, one after another.
        shuffle_window: records of a stream that are permuted among themselves.
        temperature: shares are weight ** (1 / temperature), normalised.
        cache: of remote shards.
        max_pixels: images of more, by their header, are dropped undecoded.

    Raises:
        ConfigError: no dataset, two of one name, or a number out of range.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        seed: int,
        num_streams: int = 64,
        shuffle_window: int = 1000,
        temperature: float = 1.0,
        cache: ShardCache | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if not datasets or len({dataset.name for dataset in datasets}) < len(datasets):
            names = ", ".join(dataset.name for dataset in datasets) or "none"
            raise ConfigError(
                f"datasets: {names}", where="data.datasets", fix="give at least one, each with its own name"
            )
        counts = {"num_streams": num_streams, "shuffle_window": shuffle_window, "max_pixels": max_pixels}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"{name}={value}", where=f"data.{name}", fix="give 1 or more")
        if not 0 < temperature < math.inf:
            raise ConfigError(
                f"temperature={temperature}",
                where="data.temperature",
                fix="give a positive number; 1 keeps the weights",
            )
        self.datasets, self.cache, self.max_pixels = list(datasets), cache, max_pixels
        self.seed, self.num_streams, self.shuffle_window = seed, num_streams, shuffle_window
        self.temperature = temperature
        self.choices = MixtureOrder([dataset.weight for dataset in datasets], seed=seed, temperature=temperature)

    @cached_property
    def shards(self) -> list[list[Shard]]:
        """The shards of each dataset with their record counts; looked up once.

        Raises:
            DataError: shards are missing, their records cannot be counted, or there are none.
        """
        found = [open_shards(dataset.urls, self._cache_of(dataset), dataset.index) for dataset in self.datasets]
        for dataset, shards in zip(self.datasets, found, strict=True):
            if sum(shard.num_records for shard in shards) == 0:
                raise DataError(
                    f"dataset {dataset.name} has no records",
                    where=f"urls={dataset.urls}",
                    fix="pack it again, or remove it",
                )
        return found

    def reader(self, dataset: int, max_open: int = 64) -> ShardReader:
        """Reads the records of one dataset; one per process."""
        return ShardReader(self.shards[dataset], self._cache_of(self.datasets[dataset]), max_open)

    def _cache_of(self, dataset: Dataset) -> ShardCache:
        return (self.cache or ShardCache()).with_options(dataset.storage_options)

    @cached_property
    def orders(self) -> list[DatasetOrder]:
        """The order of each dataset's records."""
        return [
            DatasetOrder(
                [shard.num_records for shard in shards],
                name=dataset.name,
                seed=self.seed,
                num_streams=self.num_streams,
                window=self.shuffle_window,
            )
            for dataset, shards in zip(self.datasets, self.shards, strict=True)
        ]

    def draws(self, stream: int, position: int) -> Iterator[Draw]:
        """The draws of a stream from `position` on, for ever."""
        numbers = self.choices.counts(stream, position)
        while True:
            for dataset in self.choices.choices(stream, position, _CHOICES_AT_ONCE).tolist():
                yield Draw(dataset, stream, numbers[dataset])
                numbers[dataset] += 1
            position += _CHOICES_AT_ONCE

    def settings(self) -> dict[str, Any]:
        """Everything that decides the order, by the names of the config; equal settings, equal samples."""
        return {
            "seed": self.seed,
            "num_streams": self.num_streams,
            "shuffle_window": self.shuffle_window,
            "temperature": self.temperature,
            "weights": {dataset.name: float(dataset.weight) for dataset in self.datasets},
            "shards": {
                dataset.name: _fingerprint(shards) for dataset, shards in zip(self.datasets, self.shards, strict=True)
            },
        }


def _fingerprint(shards: Sequence[Shard]) -> str:
    """Hash of the shards' names and counts; a dataset may move to another folder, a signed url be signed anew."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{file_name(shard.url)}:{shard.num_records}\n".encode())
    return f"{sum(shard.num_records for shard in shards)} records in {len(shards)} shards, {digest.hexdigest()[:16]}"
