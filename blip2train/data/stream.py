"""Shards -> an endless stream of undecoded records whose position is one number.

Implements what pre-training needs and WebDataset leaves to its users (webdataset issues 177, 234, 271): the stream is
a pure function of (seed, dataset, stream epoch, logical stream), so resuming is skipping, and skipping is cheap where
record counts are known. LAVIS draws shards with replacement from a global generator and restarts the data on resume.

The records of a dataset are dealt to logical streams: in every stream epoch all units (shards, or interleaved parts of
shards where there are fewer shards than streams) are shuffled with one permutation, and stream `s` of `n` takes every
n-th unit. Within a stream, records pass through a bounded shuffle buffer that is emptied at the end of the epoch: each
record appears exactly once per epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from random import Random
from typing import TypeVar

from blip2train.data.shards import INDEX_NAME, RawRecord, Shard, read_shard
from blip2train.errors import DataError

T = TypeVar("T")

_EMPTY_EPOCHS = 1000


@dataclass(frozen=True, slots=True)
class Unit:
    """Records `part`, `part + parts`, ... of one shard."""

    url: str
    part: int
    parts: int
    num_records: int | None


class SampleStream:
    """One logical stream of one dataset; holds no position, so it can be read from anywhere, again and again.

    Args:
        shards: of the dataset, the same list in the same order on every rank.
        name: of the dataset; keys the generators.
        seed: of the run.
        stream: index of this logical stream over all ranks.
        num_streams: logical streams over all ranks.
        shuffle_buffer: records held back for shuffling; 1 keeps the order inside shards.
        read: reader of one shard, for tests.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        name: str,
        seed: int,
        stream: int = 0,
        num_streams: int = 1,
        shuffle_buffer: int = 1000,
        read: Callable[[str], Iterator[RawRecord]] = read_shard,
    ) -> None:
        assert 0 <= stream < num_streams and shuffle_buffer >= 1
        self.name = name
        self._seed = seed
        self._stream = stream
        self._num_streams = num_streams
        self._shuffle_buffer = shuffle_buffer
        self._units = split_into_units(shards, num_streams)
        self._read = read

    def records(self, start: int = 0) -> Iterator[tuple[int, RawRecord]]:
        """Yield (stream epoch, record) for ever, from position `start` on.

        Whole epochs, and whole shards inside the first one, are skipped without reading where their counts are known.

        Raises:
            DataError: a shard cannot be read, disagrees with its index, or the dataset holds no record for this stream.
        """
        skip, num_empty = start, 0
        for epoch in count():
            units = self.epoch_units(epoch)
            length = _known_length(units)
            num_found = length or 0
            if length is None:
                for record in buffered_shuffle(self._read_units(units), self._shuffle_buffer, self._rng(epoch)):
                    num_found += 1
                    if skip:
                        skip -= 1
                    else:
                        yield epoch, record
            elif skip >= length:
                skip -= length
            else:
                for record in self._rest_of_epoch(units, length, skip, self._rng(epoch)):
                    yield epoch, record
                skip = 0
            num_empty = 0 if num_found else num_empty + 1
            if num_empty == _EMPTY_EPOCHS:
                raise DataError(
                    f"dataset {self.name} has no records for stream {self._stream} of {self._num_streams}",
                    where=f"shards {', '.join(sorted({unit.url for unit in self._units})[:3])}",
                    fix="use a dataset with at least one record per logical stream, or lower num_streams",
                )

    def epoch_units(self, epoch: int) -> list[Unit]:
        """The units this stream reads in one epoch, in order."""
        units = list(self._units)
        Random(f"{self._seed}/{self.name}/units/{epoch}").shuffle(units)
        return units[self._stream :: self._num_streams]

    def _rng(self, epoch: int) -> Random:
        return Random(f"{self._seed}/{self.name}/shuffle/{epoch}/{self._stream}")

    def _rest_of_epoch(self, units: Sequence[Unit], length: int, skip: int, rng: Random) -> Iterator[RawRecord]:
        """The epoch's records after the first `skip`: shuffle positions up to there, read only what is still due."""
        held, position, drained = skip_in_shuffle(length, self._shuffle_buffer, skip, rng)
        numbered = self._read_numbered(units, first=min(held, default=position))
        due = set(held)
        found: dict[int, RawRecord] = {}
        while len(found) < len(held):
            index, record = next(numbered)
            if index in due:
                found[index] = record
        buffer = [found[index] for index in held]
        if drained:
            yield from buffer
        else:
            rest = (record for index, record in numbered if index >= position)
            yield from buffered_shuffle(rest, self._shuffle_buffer, rng, buffer)

    def _read_numbered(self, units: Sequence[Unit], first: int) -> Iterator[tuple[int, RawRecord]]:
        """(position in the epoch, record) from position `first` on; units that end before it are not opened."""
        position = 0
        for unit in units:
            assert unit.num_records is not None
            end = position + unit.num_records
            if end > first:
                for record in self._read_units([unit]):
                    if position >= first:
                        yield position, record
                    position += 1
            position = end

    def _read_units(self, units: Iterable[Unit]) -> Iterator[RawRecord]:
        for unit in units:
            num_read = 0
            for record in islice(self._read(unit.url), unit.part, None, unit.parts):
                num_read += 1
                if unit.num_records is not None and num_read > unit.num_records:
                    break
                yield record
            if unit.num_records is not None and num_read != unit.num_records:
                raise DataError(
                    f"a shard whose record count differs from the {INDEX_NAME} beside it",
                    where=f"{unit.url} of dataset {self.name}",
                    fix=f"pack or copy the shard again, or delete {INDEX_NAME} (resuming is then slower)",
                )


def split_into_units(shards: Sequence[Shard], num_streams: int) -> list[Unit]:
    """At least one unit per stream: whole shards, or equally many interleaved parts of each."""
    parts = -(-num_streams // len(shards))
    return [
        Unit(
            shard.url,
            part,
            parts,
            None if shard.num_records is None else max(0, -(-(shard.num_records - part) // parts)),
        )
        for shard in shards
        for part in range(parts)
    ]


def buffered_shuffle(items: Iterable[T], size: int, rng: Random, buffer: Sequence[T] = ()) -> Iterator[T]:
    """Shuffle within a window: each new item takes the place of a random one of `size` held back, which is yielded.

    At the end the held items follow in random order. Starts from `buffer` where part of `items` was consumed before.
    """
    held = list(buffer)
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        slot = rng.randrange(size)
        yield held[slot]
        held[slot] = item
    rng.shuffle(held)
    yield from held


def skip_in_shuffle(length: int, size: int, skip: int, rng: Random) -> tuple[list[int], int, bool]:
    """State of `buffered_shuffle(range(length), size, rng)` after `skip` yields, with the same draws.

    Returns:
        The held positions, the next position to read, and whether the held ones are final (in their output order).
    """
    held = list(range(min(size, length)))
    position = len(held)
    for _ in range(min(skip, length - position)):
        held[rng.randrange(size)] = position
        position += 1
    left = skip - (length - size) if length > size else skip
    if position < length or left <= 0:
        return held, position, False
    rng.shuffle(held)
    return held[left:], position, True


def _known_length(units: Sequence[Unit]) -> int | None:
    lengths = [unit.num_records for unit in units if unit.num_records is not None]
    return sum(lengths) if len(lengths) == len(units) else None
