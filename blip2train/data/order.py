"""Which record is sample number g of a run: pure arithmetic on indices, no bytes read, nothing remembered.

Implements the sample order of a run as a function of its settings alone. LAVIS draws shards with replacement from a
global generator, so that its order depends on ranks and workers, and cannot be resumed; WebDataset leaves both to its
users (webdataset issues 177, 234, 271).

    sample g       position p = g // N of logical stream s = g mod N
    dataset        the word W[p] of the stream's generator, against integer thresholds in proportion to the weights
    draw           n = q * N + s, where q earlier positions of the stream chose the same dataset
    epoch          e = n // M for M records: every record once per epoch, whoever draws it
    place          stream s owns the next places of the epoch's sequence, as many as there are draws with n mod N = s;
                   they are permuted within windows of at most `window` records
    sequence       shards in a random order, rotated by a random offset; a dataset that the windows of all streams hold
                   at once (M <= N * window) is permuted record by record instead

Random words are Philox's raw 64-bit output, which numpy promises to keep; a permutation is their stable argsort.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]
K = TypeVar("K")
V = TypeVar("V")

TRIES_PER_WINDOW = 8
"""Replacements drawn from one window before the next one is tried: a broken shard may fill a whole window."""

_WORDS_PER_CHUNK = 1 << 16
_KEPT_WORDS = 1 << 20
_KEPT_EPOCHS = (3, 128)


@dataclass(frozen=True, slots=True)
class Place:
    """One record of a dataset in one epoch: number `index` of shard number `shard`."""

    epoch: int
    shard: int
    index: int


class DatasetOrder:
    """The order of one dataset's records.

    Args:
        sizes: records per shard; at least one record in all.
        name: of the dataset; keys the generators.
        seed: of the run.
        num_streams: logical streams N.
        window: records of a stream that are permuted among themselves; 1 keeps the order inside shards.
    """

    def __init__(self, sizes: Sequence[int], *, name: str, seed: int, num_streams: int, window: int) -> None:
        self._sizes: Integers = np.asarray(sizes, dtype=np.int64)
        self.num_records = int(self._sizes.sum())
        assert self.num_records > 0 and num_streams > 0 and window > 0
        self._key, self._num_streams, self._window = f"{seed}/{name}", num_streams, window
        self._whole = self.num_records <= num_streams * window
        self._starts = _starts(self._sizes)
        # in a long mixture the streams of a small dataset drift several epochs apart, and take turns
        words = self.num_records if self._whole else len(sizes)
        self._kept_epochs = min(max(_KEPT_EPOCHS[0], _KEPT_WORDS // words), _KEPT_EPOCHS[1])
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._permutations: OrderedDict[tuple[int, int, int], Integers] = OrderedDict()

    def record(self, stream: int, draw: int) -> Place:
        """The record of a stream's draw number `draw` (0, 1, ...) from this dataset."""
        window = self._window_at(stream, draw)
        position = draw - window.first_draw
        if not self._whole:
            key = (window.epoch, stream, window.number)
            order = _remember(
                self._permutations,
                key,
                2 * self._num_streams,
                lambda: permutation("/".join(map(str, (self._key, "window", *key))), window.size),
            )
            position = int(order[position])
        return self._locate(window.epoch, window.first_place + position)

    def replacement(self, stream: int, draw: int, attempt: int) -> Place:
        """A record to take the place of a dropped one: of the same window, after some attempts of the next ones.

        Args:
            stream: logical stream of the draw.
            draw: number of the draw in its stream.
            attempt: 0, 1, ...; may name the dropped record itself.
        """
        word = int(random_words(f"{self._key}/replacement/{stream}/{draw}", attempt, 1)[0])
        if self._whole:  # a window may hold a single record
            return self._locate(self.epoch(stream, draw), word * self.num_records >> 64)
        window = self._window_at(stream, draw, ahead=attempt // TRIES_PER_WINDOW)
        return self._locate(window.epoch, window.first_place + (word * window.size >> 64))

    def epoch(self, stream: int, draw: int) -> int:
        """The epoch of a draw."""
        return (draw * self._num_streams + stream) // self.num_records

    def window_end(self, stream: int, draw: int) -> int:
        """The stream's first draw after the window of `draw`."""
        window = self._window_at(stream, draw)
        return window.first_draw + window.size

    def shards_of_window(self, stream: int, draw: int) -> list[int]:
        """The shards that the window of a draw lies in, in the order of the epoch's sequence."""
        window = self._window_at(stream, draw)
        places = range(window.first_place, window.first_place + window.size)
        return list(dict.fromkeys(self._locate(window.epoch, place).shard for place in places))

    def _window_at(self, stream: int, draw: int, ahead: int = 0) -> _Window:
        """The window of a draw, or the one `ahead` windows later in the stream's part of the epoch, going round."""
        epoch = self.epoch(stream, draw)
        start, end = epoch * self.num_records, (epoch + 1) * self.num_records
        first_draw = _below(start, stream, self._num_streams)
        count = _below(end, stream, self._num_streams) - first_draw
        first_place = _before(end, stream, self._num_streams) - _before(start, stream, self._num_streams)
        num_windows = 1 if self._whole else -(-count // self._window)
        # windows end at (k + 1) * count // num_windows: equal sizes, give or take one record
        number = ((draw - first_draw + 1) * num_windows - 1) // count
        number = (number + ahead) % num_windows
        start, end = number * count // num_windows, (number + 1) * count // num_windows
        return _Window(epoch, number, first_draw + start, first_place + start, end - start)

    def _locate(self, epoch: int, place: int) -> Place:
        known = _remember(self._epochs, epoch, self._kept_epochs, lambda: self._make_epoch(epoch))
        return Place(epoch, *known.locate(place, by_record=self._whole))

    def _make_epoch(self, epoch: int) -> _Epoch:
        if self._whole:
            return _Epoch(permutation(f"{self._key}/records/{epoch}", self.num_records), self._starts, 0)
        order = permutation(f"{self._key}/shards/{epoch}", len(self._sizes))
        offset = int(random_words(f"{self._key}/offset/{epoch}", 0, 1)[0]) * self.num_records >> 64
        return _Epoch(order, _starts(self._sizes[order]), offset)


@dataclass(frozen=True, slots=True)
class _Window:
    """`size` draws of a stream from `first_draw` on, which take the places of the sequence from `first_place` on."""

    epoch: int
    number: int
    first_draw: int
    first_place: int
    size: int


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The sequence of one epoch: shards (or records) in order, where each shard starts in it, and its rotation."""

    order: Integers
    starts: Integers
    offset: int

    def locate(self, place: int, *, by_record: bool) -> tuple[int, int]:
        """Shard and index of a place."""
        if by_record:
            record = int(self.order[place])
            shard = int(np.searchsorted(self.starts, record, side="right")) - 1
            return shard, record - int(self.starts[shard])
        turned = (place + self.offset) % int(self.starts[-1])
        rank = int(np.searchsorted(self.starts, turned, side="right")) - 1
        return int(self.order[rank]), turned - int(self.starts[rank])


class MixtureOrder:
    """Which dataset each position of a stream takes: independent draws in proportion to weight ** (1 / temperature).

    Args:
        weights: one per dataset, positive.
        seed: of the run.
        temperature: 1 keeps the proportions, larger ones even them out.
    """

    def __init__(self, weights: Sequence[float], *, seed: int, temperature: float = 1.0) -> None:
        assert weights and min(weights) > 0 and temperature > 0
        self._seed = seed
        self.shares = tempered_shares(weights, temperature)
        ends = list(accumulate(self.shares))[:-1]
        self.thresholds: Words = np.array([min(int(end * 2**64), 2**64 - 1) for end in ends], dtype=np.uint64)

    def choices(self, stream: int, start: int, count: int) -> Integers:
        """(count,) numbers of the datasets at positions start, start + 1, ... of a stream."""
        if not len(self.thresholds):
            return np.zeros(count, dtype=np.int64)
        words = random_words(f"{self._seed}/mixture/{stream}", start, count)
        return np.searchsorted(self.thresholds, words, side="right").astype(np.int64)

    def counts(self, stream: int, position: int) -> list[int]:
        """How often each dataset was chosen before `position`, which takes some milliseconds per million."""
        below = [0] * len(self.thresholds)
        for start in range(0, position, _WORDS_PER_CHUNK):
            if not below:
                break
            words = random_words(f"{self._seed}/mixture/{stream}", start, min(_WORDS_PER_CHUNK, position - start))
            for number, threshold in enumerate(self.thresholds):
                below[number] += int(np.count_nonzero(words < threshold))
        ends = [0, *below, position]
        return [end - start for start, end in pairwise(ends)]


def tempered_shares(weights: Sequence[float], temperature: float) -> list[float]:
    """Shares that sum to one: weight ** (1 / temperature), normalised."""
    largest = max(weights)
    powers = [(weight / largest) ** (1 / temperature) for weight in weights]
    return [power / sum(powers) for power in powers]


def random_words(key: str, start: int, count: int) -> Words:
    """(count,) uint64: words start, start + 1, ... of the endless sequence that `key` names."""
    digest = hashlib.sha256(key.encode()).digest()
    skipped = start % 4  # Philox makes four words per step of its counter
    generator = np.random.Philox(
        key=np.frombuffer(digest[:16], dtype="<u8"), counter=np.array([start // 4, 0, 0, 0], dtype=np.uint64)
    )
    words: Words = generator.random_raw(skipped + count)
    return words[skipped:]


def permutation(key: str, size: int) -> Integers:
    """(size,) a random order of 0 .. size - 1 that `key` names."""
    order: Integers = np.argsort(random_words(key, 0, size), kind="stable")
    return order


def _starts(sizes: Integers) -> Integers:
    """(n + 1,) where each of n neighbours starts, and where the last one ends."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])


def _below(number: int, stream: int, num_streams: int) -> int:
    """How many of 0 .. number - 1 have the remainder `stream`."""
    return number // num_streams + (number % num_streams > stream)


def _before(number: int, stream: int, num_streams: int) -> int:
    """How many of 0 .. number - 1 have a remainder below `stream`."""
    return number // num_streams * stream + min(number % num_streams, stream)


def _remember(known: OrderedDict[K, V], key: K, size: int, make: Callable[[], V]) -> V:
    """`known[key]`, made where it is missing; the least recently used of more than `size` is forgotten."""
    if key in known:
        known.move_to_end(key)
    else:
        known[key] = make()
        if len(known) > size:
            known.popitem(last=False)
    return known[key]
