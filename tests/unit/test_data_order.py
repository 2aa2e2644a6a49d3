"""The sample order does what its formulas say, against loops that count; and is fast and small at LAION's size."""

import time
import tracemalloc
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from blip2train.data.order import (
    TRIES_PER_WINDOW,
    DatasetOrder,
    MixtureOrder,
    Place,
    permutation,
    random_words,
    tempered_shares,
)

SHAPES = [
    ([5], 1, 3),
    ([1], 4, 10),
    ([4, 0, 7, 3], 3, 2),
    ([9, 6, 9, 8, 10], 4, 5),
    ([100, 50, 25], 8, 1),
    ([40, 41, 42], 8, 3),
    ([12, 30], 16, 1000),
]
"""Shard sizes, streams, window: windowed and permuted whole, with empty shards and streams without a record."""


def epochs(sizes: list[int], num_streams: int, window: int, count: int, seed: int = 0) -> list[list[Place]]:
    """The first `count` epochs, draw by draw in the order n = 0, 1, 2, ..."""
    order = DatasetOrder(sizes, name="set", seed=seed, num_streams=num_streams, window=window)
    total = sum(sizes)
    found = [order.record(number % num_streams, number // num_streams) for number in range(count * total)]
    return [found[start : start + total] for start in range(0, count * total, total)]


@pytest.mark.parametrize(("sizes", "num_streams", "window"), SHAPES)
def test_an_epoch_is_every_record_once(sizes: list[int], num_streams: int, window: int) -> None:
    everything = sorted((shard, index) for shard, size in enumerate(sizes) for index in range(size))
    for number, places in enumerate(epochs(sizes, num_streams, window, 4)):
        assert {place.epoch for place in places} == {number}
        assert sorted((place.shard, place.index) for place in places) == everything


@pytest.mark.parametrize(("sizes", "num_streams", "window"), SHAPES)
def test_the_order_equals_a_plain_reading_of_its_definition(sizes: list[int], num_streams: int, window: int) -> None:
    """Sequence, slices and windows built as lists, with nothing but the random words in common."""
    total, records = sum(sizes), [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]
    for epoch, places in enumerate(epochs(sizes, num_streams, window, 3, seed=5)):
        draws = range(epoch * total, (epoch + 1) * total)
        if total <= num_streams * window:
            words = random_words(f"5/set/records/{epoch}", 0, total)
            sequence = [records[place] for place in sorted(range(total), key=lambda place: words[place])]
        else:
            words = random_words(f"5/set/shards/{epoch}", 0, len(sizes))
            shards = sorted(range(len(sizes)), key=lambda shard: words[shard])
            sequence = [(shard, index) for shard in shards for index in range(sizes[shard])]
            offset = int(random_words(f"5/set/offset/{epoch}", 0, 1)[0] * Fraction(total, 2**64))
            sequence = sequence[offset:] + sequence[:offset]
        expected = {}
        for stream in range(num_streams):
            own = [number for number in draws if number % num_streams == stream]
            part, sequence = sequence[: len(own)], sequence[len(own) :]
            if total > num_streams * window:
                part = in_windows(part, window, f"5/set/window/{epoch}/{stream}")
            expected |= dict(zip(own, part, strict=True))
        assert [(place.shard, place.index) for place in places] == [expected[number] for number in draws]


def in_windows(part: list[tuple[int, int]], window: int, key: str) -> list[tuple[int, int]]:
    count, shuffled = -(-len(part) // window), []
    for number in range(count):
        rows = part[number * len(part) // count : (number + 1) * len(part) // count]
        assert len(rows) <= window
        words = random_words(f"{key}/{number}", 0, len(rows))
        shuffled += [rows[place] for place in sorted(range(len(rows)), key=lambda place: words[place])]
    return shuffled


@pytest.mark.parametrize(("sizes", "num_streams", "window"), SHAPES)
def test_a_window_ends_where_it_says_and_lies_in_the_shards_it_names(
    sizes: list[int], num_streams: int, window: int
) -> None:
    order = DatasetOrder(sizes, name="set", seed=3, num_streams=num_streams, window=window)
    for stream in range(num_streams):
        draw = 0
        while draw * num_streams < 3 * sum(sizes):
            end = order.window_end(stream, draw)
            assert end > draw
            inside = [order.record(stream, number) for number in range(draw, end)]
            assert len({place.epoch for place in inside}) == 1
            assert {place.shard for place in inside} == set(order.shards_of_window(stream, draw))
            assert {order.window_end(stream, number) for number in range(draw, end)} == {end}
            draw = end


def test_replacements_come_from_the_window_first_and_from_the_next_ones_later() -> None:
    order = DatasetOrder([50] * 6, name="set", seed=1, num_streams=2, window=10)
    for stream, draw in [(0, 0), (1, 37), (0, 149), (1, 151)]:
        start = next(d for d in range(draw + 1) if order.window_end(stream, d) == order.window_end(stream, draw))
        own = {order.record(stream, number) for number in range(start, order.window_end(stream, draw))}
        tries = [order.replacement(stream, draw, attempt) for attempt in range(3 * TRIES_PER_WINDOW)]
        assert set(tries[:TRIES_PER_WINDOW]) <= own and not set(tries[TRIES_PER_WINDOW:]) & own
        assert len(set(tries[:TRIES_PER_WINDOW])) > 2
        assert {place.epoch for place in tries} == {order.epoch(stream, draw)}


def test_a_small_dataset_finds_replacements_everywhere() -> None:
    order = DatasetOrder([5, 5], name="set", seed=1, num_streams=64, window=1000)
    assert len({order.replacement(7, 3, attempt) for attempt in range(200)}) == 10


def test_seed_name_and_epoch_change_the_order() -> None:
    first, second = epochs([30, 40], 4, 1000, 2)
    other_seed = epochs([30, 40], 4, 1000, 1, seed=1)[0]
    positions = [[(place.shard, place.index) for place in places] for places in (first, second, other_seed)]
    assert len({tuple(places) for places in positions}) == 3
    named = [DatasetOrder([100], name=name, seed=0, num_streams=1, window=200) for name in ("a", "b")]
    assert [order.record(0, 0) for order in named] != [order.record(0, 1) for order in named]
    assert [named[0].record(0, draw) for draw in range(9)] != [named[1].record(0, draw) for draw in range(9)]


def test_neighbours_of_a_shard_do_not_stay_neighbours() -> None:
    places = epochs([200] * 10, 8, 50, 1)[0]
    follows = sum(b.shard == a.shard and b.index == a.index + 1 for a, b in pairwise(places))
    assert follows < 20


def test_choices_follow_the_weights_and_counts_count_them() -> None:
    mixture = MixtureOrder([3.0, 1.0, 0.5], seed=4)
    for stream in (0, 5):
        choices = mixture.choices(stream, 0, 70_000)
        for position in (0, 1, 3, 4, 5, 65_536, 65_537, 70_000):
            counted = Counter(choices[:position].tolist())
            assert mixture.counts(stream, position) == [counted[number] for number in range(3)]
        shares = np.bincount(choices) / len(choices)
        assert np.abs(shares - np.array([3, 1, 0.5]) / 4.5).max() < 0.01
    assert (mixture.choices(0, 0, 50) != mixture.choices(1, 0, 50)).any()


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 1001])
def test_choices_may_be_asked_for_from_anywhere(start: int) -> None:
    mixture = MixtureOrder([1.0, 1.0], seed=4)
    assert mixture.choices(2, start, 50).tolist() == mixture.choices(2, 0, start + 50)[start:].tolist()


def test_one_dataset_is_always_chosen() -> None:
    mixture = MixtureOrder([0.3], seed=4)
    assert mixture.choices(1, 9, 4).tolist() == [0] * 4 and mixture.counts(1, 9) == [9]


def test_temperature_evens_the_shares_out() -> None:
    assert tempered_shares([1.0, 3.0], 1.0) == pytest.approx([0.25, 0.75])
    assert tempered_shares([1.0, 4.0], 2.0) == pytest.approx([1 / 3, 2 / 3])
    assert tempered_shares([1.0, 1e6], 1e9) == pytest.approx([0.5, 0.5])
    assert MixtureOrder([1.0, 4.0], seed=0, temperature=2.0).shares == pytest.approx([1 / 3, 2 / 3])


def test_random_words_are_numpys_philox() -> None:
    """Raw words of a bit generator are the part of numpy that stays the same; a change here loses every resume."""
    assert random_words("0/x", 0, 3).tolist() == [15625176376778371362, 10358621741605127985, 4992173295973426987]
    assert random_words("0/x", 2, 5).tolist() == random_words("0/x", 0, 7).tolist()[2:]
    assert sorted(permutation("0/x", 1000).tolist()) == list(range(1000))


def test_laions_size_is_quick_and_small() -> None:
    tracemalloc.start()
    started = time.perf_counter()
    order = DatasetOrder([1000] * 115_000, name="laion", seed=0, num_streams=64, window=1000)
    seen = [order.record(stream, 3_000_000 + step) for step in range(20) for stream in range(64)]
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(seen)) == len(seen) and {place.epoch for place in seen} == {1}
    assert seconds < 2 and peak < 30e6


def test_streams_of_a_small_dataset_may_stand_in_many_epochs_at_no_cost() -> None:
    """In a mixture of 580M samples the streams of a dataset of 64,000 records are several epochs apart."""
    order = DatasetOrder([8000] * 8, name="small", seed=0, num_streams=64, window=1000)
    draws = [1000 * (stream % 13) for stream in range(64)]
    for stream, draw in enumerate(draws):
        order.record(stream, draw)
    started = time.perf_counter()
    seen = [order.record(stream, draw + step) for step in range(1, 11) for stream, draw in enumerate(draws)]
    assert {place.epoch for place in seen} == set(range(13))
    assert time.perf_counter() - started < 0.5  # 640 permutations of 64,000 would take some seconds
