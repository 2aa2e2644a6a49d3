"""The stream is exhaustive, disjoint, repeatable, and skipping equals reading: all against naive loops."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from shard_factory import write_shards

from blip2train.data.shards import RawRecord, Shard, open_shards
from blip2train.data.stream import SampleStream, buffered_shuffle, skip_in_shuffle, split_into_units
from blip2train.errors import DataError

SIZES = {"a": 7, "b": 4, "c": 9}


def stream(
    sizes: dict[str, int] = SIZES, *, counted: bool = True, opened: list[str] | None = None, **options: int
) -> SampleStream:
    """A stream over shards that exist only here."""

    def read(url: str) -> Iterator[RawRecord]:
        if opened is not None:
            opened.append(url)
        for number in range(sizes[url]):
            yield {"__key__": f"{url}{number}", "__url__": url}

    shards = [Shard(url, size if counted else None) for url, size in sizes.items()]
    settings = {"seed": 0, "shuffle_buffer": 5} | options
    return SampleStream(shards, name="set", read=read, **settings)


def keys(made: SampleStream, count: int, start: int = 0) -> list[tuple[int, str]]:
    return [(epoch, record["__key__"]) for epoch, record in islice(made.records(start), count)]


EVERYTHING = {f"{url}{number}" for url, size in SIZES.items() for number in range(size)}


@pytest.mark.parametrize("buffer", [1, 3, 20, 1000])
def test_every_record_appears_once_per_epoch(buffer: int) -> None:
    found = keys(stream(shuffle_buffer=buffer), 60)
    for epoch in range(3):
        part = found[20 * epoch : 20 * (epoch + 1)]
        assert {number for number, _ in part} == {epoch}
        assert {key for _, key in part} == EVERYTHING
    assert [key for _, key in found[:20]] != [key for _, key in found[20:40]]


@pytest.mark.parametrize("num_streams", [1, 2, 3, 4, 7, 20])
def test_streams_share_an_epoch_without_overlap(num_streams: int) -> None:
    for epoch in range(2):
        taken: Counter[str] = Counter()
        for index in range(num_streams):
            for number, key in keys(stream(stream=index, num_streams=num_streams), 60):
                taken[key] += number == epoch
        assert taken == Counter(dict.fromkeys(EVERYTHING, 1))


@pytest.mark.parametrize("buffer", [1, 5, 100])
@pytest.mark.parametrize(("index", "num_streams"), [(0, 1), (1, 2), (4, 7)])
@pytest.mark.parametrize("counted", [True, False])
def test_starting_anywhere_equals_reading_up_to_there(buffer: int, index: int, num_streams: int, counted: bool) -> None:
    made = stream(counted=counted, stream=index, num_streams=num_streams, shuffle_buffer=buffer)
    whole = keys(made, 80)
    for start in range(66):
        assert keys(made, 14, start) == whole[start : start + 14]


def test_known_counts_change_the_speed_and_not_the_order() -> None:
    for index in range(3):
        options = {"stream": index, "num_streams": 3}
        assert keys(stream(counted=True, **options), 70) == keys(stream(counted=False, **options), 70)


def test_skipped_shards_are_not_opened() -> None:
    opened: list[str] = []
    sizes = {f"s{number}": 10 for number in range(10)}
    made = stream(sizes, opened=opened, shuffle_buffer=10)
    keys(made, 1, start=100 * 1000 + 85)
    assert len(opened) <= 3


def test_seed_dataset_and_epoch_all_change_the_order() -> None:
    shards = [Shard("a", 50)]

    def order(name: str, seed: int) -> list[str]:
        read = lambda url: ({"__key__": str(number), "__url__": url} for number in range(50))  # noqa: E731
        made = SampleStream(shards, name=name, seed=seed, shuffle_buffer=50, read=read)
        return [record["__key__"] for _, record in islice(made.records(), 50)]

    assert len({tuple(order(*key)) for key in (("x", 0), ("x", 1), ("y", 0))}) == 3
    assert order("x", 0) == order("x", 0)


@pytest.mark.parametrize("claimed", [6, 8])
def test_a_shard_that_disagrees_with_its_index_is_a_data_error(claimed: int) -> None:
    made = SampleStream(
        [Shard("a", claimed)], name="set", seed=0, read=lambda url: iter([{"__key__": str(n)} for n in range(7)])
    )
    with pytest.raises(DataError, match=r"a of dataset set"):
        keys(made, 20)


def test_a_stream_that_never_finds_a_record_stops() -> None:
    for counted in (True, False):
        with pytest.raises(DataError, match="no records for stream 0 of 1"):
            keys(stream({"a": 0}, counted=counted), 1)


def test_real_shards_stream_the_same_with_and_without_index(tmp_path: Path) -> None:
    orders = []
    for index in (True, False):
        folder = tmp_path / str(index)
        write_shards(folder, [3, 2, 4], index=index)
        made = SampleStream(open_shards(str(folder)), name="set", seed=1, shuffle_buffer=4)
        orders.append(keys(made, 18, 5))
    assert orders[0] == orders[1]


@pytest.mark.parametrize("length", [0, 1, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 8, 50])
def test_skipping_in_the_shuffle_equals_drawing(length: int, size: int) -> None:
    expected = list(buffered_shuffle(range(length), size, Random(3)))
    assert sorted(expected) == list(range(length))
    for skip in range(length + 1):
        rng = Random(3)
        held, position, drained = skip_in_shuffle(length, size, skip, rng)
        rest = held if drained else list(buffered_shuffle(range(position, length), size, rng, held))
        assert rest == expected[skip:]
        assert len(held) <= size


def test_a_large_buffer_shuffles_evenly() -> None:
    """Each of 6 items comes first in about a sixth of 3000 shuffles."""
    first = Counter(next(buffered_shuffle(range(6), 6, Random(seed))) for seed in range(3000))
    assert all(abs(first[item] - 500) < 100 for item in range(6))


def test_units_are_whole_shards_or_equal_parts() -> None:
    shards = [Shard("a", 7), Shard("b", None)]
    assert [(unit.url, unit.part, unit.parts) for unit in split_into_units(shards, 2)] == [("a", 0, 1), ("b", 0, 1)]
    parts = split_into_units(shards, 5)
    assert [(unit.url, unit.part, unit.num_records) for unit in parts] == [
        ("a", 0, 3), ("a", 1, 2), ("a", 2, 2), ("b", 0, None), ("b", 1, None), ("b", 2, None),
    ]  # fmt: skip
