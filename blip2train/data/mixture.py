"""Weighted datasets -> batches: which records make batch number b, independent of who reads it.

Implements the mixture of pre-training sources (paper section 3.4). Batch b of a rank comes from logical stream b modulo
`num_streams`, so any number of loader workers gives the same batches in the same order, and a resumed run may change
it. LAVIS draws the dataset with Python's global generator in the main process and cannot repeat or resume the sequence.

A batch owns a fixed quota of records. A record that has to be dropped is replaced by one of the stream's next records,
which is seen again in its own turn: positions never depend on what was dropped, so skipping never needs to decode.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from random import Random
from typing import TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from blip2train.batch import Sample
from blip2train.data.drop import DropCounter, counts_to_dict, empty_counts
from blip2train.data.image_transform import Transform
from blip2train.data.reader import RecordReader
from blip2train.data.shards import Shard, open_shards
from blip2train.data.stream import SampleStream
from blip2train.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

BatchT = TypeVar("BatchT")

_MAX_STREAMS = 8
_RECORDS_PER_STREAM = 4096
_SHARDS_PER_STREAM = 4


@dataclass
class Dataset:
    """One source of a mixture.

    Args:
        name: unique in the mixture; keys the generators, so renaming a dataset changes what is drawn.
        urls: shards, as `shards.expand_urls` takes them.
        transform: training augmentation.
        weight: relative share of samples; weights need not sum to one.
    """

    name: str
    urls: str | Sequence[str]
    transform: Transform
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ConfigError(
                f"weight {self.weight} of dataset {self.name}",
                where=f"datasets.{self.name}.weight",
                fix="give a positive number",
            )

    @cached_property
    def shards(self) -> list[Shard]:
        """The shards with their record counts; looked up once."""
        return open_shards(self.urls)


class Mixture(IterableDataset[BatchT]):
    """Endless batches of one rank, collated here so that a batch is whole before it leaves its worker.

    Args:
        datasets: at least one.
        collate: list of samples -> batch.
        batch_size: samples per batch on this rank.
        seed: of the run; the same on every rank.
        shuffle_buffer: encoded records held back per dataset and logical stream: 1000 records of 40 KB, 8 streams and 6
            datasets hold 1.9 GB on each rank.
        num_streams: logical streams per rank; None chooses by `default_num_streams`. Reading is parallel up to this
            number of workers; more workers share streams, which costs reading but no decoding.
        max_dropped_share: DataError when a dataset drops more than this share of its records.
        rank: of this process; ranks read disjoint records.
        world_size: number of ranks.
        num_workers: of the loader, 0 or more; only counts are kept per worker.
        first_batch: number of batches that were consumed before.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        collate: Callable[[list[Sample]], BatchT],
        *,
        batch_size: int,
        seed: int,
        shuffle_buffer: int = 1000,
        num_streams: int | None = None,
        max_dropped_share: float = 0.1,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        first_batch: int = 0,
    ) -> None:
        if not datasets or len({dataset.name for dataset in datasets}) < len(datasets):
            names = ", ".join(dataset.name for dataset in datasets) or "none"
            raise ConfigError(
                f"datasets: {names}", where="data.datasets", fix="give at least one, each with its own name"
            )
        if batch_size < 1 or shuffle_buffer < 1:
            raise ConfigError(
                f"batch_size={batch_size}, shuffle_buffer={shuffle_buffer}", where="data", fix="give 1 or more for both"
            )
        self.datasets = list(datasets)
        self.collate = collate
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.num_streams = num_streams or default_num_streams([dataset.shards for dataset in datasets], world_size)
        self.rank, self.world_size = rank, world_size
        self.first_batch = first_batch
        self._max_dropped_share = max_dropped_share
        self._counts = empty_counts(max(1, num_workers), len(datasets))
        self._counts.share_memory_()  # type: ignore[no-untyped-call]
        for dataset in datasets:
            if sum(1 if shard.num_records is None else shard.num_records for shard in dataset.shards) == 0:
                raise DataError(
                    f"dataset {dataset.name} has no records",
                    where=f"urls={dataset.urls}",
                    fix="pack it again, or remove it",
                )

    def __iter__(self) -> Iterator[BatchT]:
        """Yield this worker's batches: every `num_workers`-th one, which is how a DataLoader puts them together."""
        worker = get_worker_info()
        index, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if step > 1 and self.num_streams % step and index == 0:
            logger.info("%d workers share %d streams: some records are read twice", step, self.num_streams)
        counters = [
            DropCounter(dataset.name, self._max_dropped_share, counts=self._counts[index, place])
            for place, dataset in enumerate(self.datasets)
        ]
        streams: dict[int, _StreamCursor] = {}
        number = self.first_batch + index
        while True:
            round_, stream = divmod(number, self.num_streams)
            if stream not in streams:
                streams[stream] = _StreamCursor(self, stream, round_, counters)
            yield self.collate(streams[stream].batch(round_))
            number += step

    def counters(self) -> dict[str, dict[str, int]]:
        """Records used and dropped so far, by dataset and cause, over all workers of this rank.

        Readable in the main process while workers run; includes batches that wait in the loader's queue.
        """
        totals = self._counts.sum(dim=0).tolist()
        return {dataset.name: counts_to_dict(row) for dataset, row in zip(self.datasets, totals, strict=True)}

    def fingerprint(self) -> str:
        """Hash of everything besides seed, batch size and ranks that decides which records make a batch."""
        digest = hashlib.sha256(f"{self.shuffle_buffer}".encode())
        for dataset in self.datasets:
            shards = [(PurePath(shard.url).name, shard.num_records) for shard in dataset.shards]
            digest.update(repr((dataset.name, dataset.weight, shards)).encode())
        return digest.hexdigest()[:16]

    def choices(self, stream: int, round_: int) -> list[int]:
        """Index of the dataset of each sample of a stream's batch number `round_`."""
        if len(self.datasets) == 1:
            return [0] * self.batch_size
        weights = [dataset.weight for dataset in self.datasets]
        rng = Random(f"{self.seed}/mixture/{self.global_stream(stream)}/{round_}")
        return rng.choices(range(len(weights)), weights, k=self.batch_size)

    def global_stream(self, stream: int) -> int:
        return self.rank * self.num_streams + stream


def default_num_streams(datasets: Sequence[Sequence[Shard]], world_size: int) -> int:
    """Number of streams per rank: a power of two, at most 8, that leaves each stream thousands of records to shuffle.

    A function of the data alone, never of the number of workers. A small dataset gets one stream, so that a batch is
    drawn from all of it.
    """
    limit = _MAX_STREAMS
    for shards in datasets:
        counts = [shard.num_records for shard in shards if shard.num_records is not None]
        room = sum(counts) // _RECORDS_PER_STREAM if len(counts) == len(shards) else len(shards) // _SHARDS_PER_STREAM
        limit = min(limit, room // world_size)
    return 1 << max(0, limit.bit_length() - 1)


class _StreamCursor:
    """One logical stream of all datasets, standing in front of batch number `round_` of that stream."""

    def __init__(self, mixture: Mixture[BatchT], stream: int, round_: int, counters: Sequence[DropCounter]) -> None:
        self._mixture = mixture
        self._stream = stream
        self._round = round_
        starts = _num_drawn(mixture, stream, round_)
        self._readers = [
            RecordReader(
                SampleStream(
                    dataset.shards,
                    name=dataset.name,
                    seed=mixture.seed,
                    stream=mixture.global_stream(stream),
                    num_streams=mixture.world_size * mixture.num_streams,
                    shuffle_buffer=mixture.shuffle_buffer,
                ).records(starts[place]),
                name=dataset.name,
                transform=dataset.transform,
                seed=mixture.seed,
                counter=counters[place],
            )
            for place, dataset in enumerate(mixture.datasets)
        ]

    def batch(self, round_: int) -> list[Sample]:
        """The samples of batch number `round_`; batches before it, which other workers deliver, are read over."""
        while self._round < round_:
            for choice in self._mixture.choices(self._stream, self._round):
                self._readers[choice].take()
            self._round += 1
        choices = self._mixture.choices(self._stream, round_)
        quota = [(self._readers[choice], *self._readers[choice].take()) for choice in choices]
        self._round += 1
        samples = [reader.decode(epoch, record) for reader, epoch, record in quota]
        for reader in self._readers:
            reader.rewind_lookahead()
        return [
            reader.replacement() if sample is None else sample
            for (reader, _, _), sample in zip(quota, samples, strict=True)
        ]


def _num_drawn(mixture: Mixture[BatchT], stream: int, num_rounds: int) -> Mapping[int, int]:
    """Records that the first `num_rounds` batches of a stream take from each dataset."""
    if len(mixture.datasets) == 1:
        return Counter({0: num_rounds * mixture.batch_size})
    drawn: Counter[int] = Counter()
    for round_ in range(num_rounds):
        drawn.update(mixture.choices(stream, round_))
    return drawn
