"""`blip2train show order`: which records a run draws, sample by sample, without decoding any of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from blip2train.cli.check import contrastive_batch
from blip2train.cli.config import build
from blip2train.errors import ConfigError

if TYPE_CHECKING:
    from blip2train.data.mixture import Mixture

COLUMNS = ("step", "sample", "dataset", "epoch", "shard", "record", "key")


def show_order(config: DictConfig) -> None:
    """Print one line per sample, fields separated by tabs.

    A record that cannot be used shows here as drawn; training takes another one in its place and names it in
    `dropped.jsonl`.

    Raises:
        ConfigError: `steps` or `samples` is no range, or nothing says how many samples a step has.
        DataError: shards are missing or cannot be counted.
    """
    per_step = _samples_per_step(config)
    if config.get("samples", None) is not None:
        first, last = _range(config.samples, "samples", smallest=0)
    else:
        first, last = _range(config.steps, "steps", smallest=1)
        if per_step is None:
            raise ConfigError(
                f"devices={config.trainer.devices} is decided at start, and with it the samples of a step",
                where="trainer.devices",
                fix="give trainer.devices=N, or samples=FIRST..LAST",
            )
        first, last = (first - 1) * per_step, last * per_step - 1
    sys.stdout.write("\t".join(COLUMNS) + "\n")
    for number, fields in drawn_records(_mixture(config.data), first, last):
        step = "" if per_step is None else number // per_step + 1
        sys.stdout.write("\t".join(map(str, (step, number, *fields))) + "\n")


def drawn_records(mixture: Mixture, first: int, last: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """(sample, (dataset, epoch, shard, record, key)) of the samples from `first` to `last`, both included."""
    readers = [mixture.reader(number) for number in range(len(mixture.datasets))]
    streams: dict[int, Any] = {}
    for number in range(first, last + 1):
        position, stream = divmod(number, mixture.num_streams)
        if stream not in streams:
            streams[stream] = mixture.draws(stream, position)
        draw = next(streams[stream])
        place = mixture.orders[draw.dataset].record(draw.stream, draw.number)
        record = readers[draw.dataset].record(place.shard, place.index)
        name = mixture.datasets[draw.dataset].name
        yield number, (name, place.epoch, record["__url__"], place.index, record["__key__"])


def _mixture(data: DictConfig) -> Mixture:
    """As the datamodule makes it; the collator, whose tokenizer takes seconds to load, has no say in the order."""
    from blip2train.data.mixture import Mixture

    return Mixture(
        [build(dataset) for dataset in data.datasets.values()],
        seed=data.seed,
        num_streams=data.num_streams,
        shuffle_window=data.shuffle_window,
        temperature=data.temperature,
        cache=build(data.get("cache")),
    )


def _samples_per_step(config: DictConfig) -> int | None:
    batch = contrastive_batch(config)
    return None if batch is None else batch * int(config.trainer.get("accumulate_grad_batches", 1))


def _range(text: Any, where: str, *, smallest: int) -> tuple[int, int]:
    first, dots, last = str(text).partition("..")
    numbers = [part for part in (first, last if dots else first) if part.isdecimal()]
    if len(numbers) < 2 or not smallest <= int(numbers[0]) <= int(numbers[1]):
        raise ConfigError(
            f"{where}={text}", where=where, fix=f"give FIRST..LAST, whole numbers from {smallest} on, or a single one"
        )
    return int(numbers[0]), int(numbers[1])
