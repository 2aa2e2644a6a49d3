"""Batches are a function of seed, rank and number alone; weights, ranks and broken records behave."""

import pickle
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_factory import plain, write_shards, write_tar

from blip2train.batch import Sample
from blip2train.data.datamodule import TrainLoader
from blip2train.data.mixture import Dataset, Mixture, default_num_streams
from blip2train.data.shards import Shard
from blip2train.errors import ConfigError, DataError

Rows = list[tuple[str, str, str, int]]


def rows(samples: list[Sample]) -> Rows:
    """Everything that is drawn for a sample: who, which caption, what the augmentation got."""
    return [(sample.dataset, sample.key, sample.caption, int(sample.image[0, 0, 0])) for sample in samples]


@pytest.fixture
def two_sets(tmp_path: Path) -> list[Dataset]:
    write_shards(tmp_path / "big", [9, 6, 9], name="b")
    write_shards(tmp_path / "small", [5, 5], name="s", index=False)
    return [
        Dataset("big", str(tmp_path / "big"), plain, weight=3.0),
        Dataset("small", str(tmp_path / "small"), plain, weight=1.0),
    ]


def mixture(datasets: list[Dataset], **options: object) -> Mixture[Rows]:
    settings: dict[str, object] = {"batch_size": 4, "seed": 7, "shuffle_buffer": 6, "num_streams": 1}
    return Mixture(datasets, rows, **(settings | options))  # type: ignore[arg-type]


def take(made: Mixture[Rows], count: int, num_workers: int = 0) -> list[Rows]:
    start = made.first_batch
    iterator: Iterator[Rows] = iter(TrainLoader(made, num_workers, 2, lambda: start))  # type: ignore[arg-type]
    return list(islice(iterator, count))


@pytest.mark.parametrize("num_streams", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_workers(two_sets: list[Dataset], num_streams: int) -> None:
    expected = take(mixture(two_sets, num_streams=num_streams), 30)
    for num_workers in (1, 2, 3):
        made = mixture(two_sets, num_streams=num_streams, num_workers=num_workers)
        assert take(made, 30, num_workers) == expected


@pytest.mark.parametrize("num_streams", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_at_a_batch_equals_having_read_the_ones_before(
    two_sets: list[Dataset], num_streams: int, num_workers: int
) -> None:
    expected = take(mixture(two_sets, num_streams=num_streams), 40)
    for start in (1, 2, 7, 30):
        made = mixture(two_sets, num_streams=num_streams, num_workers=num_workers, first_batch=start)
        assert take(made, 10, num_workers) == expected[start : start + 10]


def test_ranks_read_disjoint_records(two_sets: list[Dataset]) -> None:
    for world_size in (2, 3):
        seen: list[str] = []
        for rank in range(world_size):
            made = mixture(two_sets[:1], rank=rank, world_size=world_size, batch_size=2)
            seen += [key for batch in take(made, 3) for _, key, _, _ in batch]
        assert len(set(seen)) == len(seen) == 6 * world_size


def test_a_mixture_survives_the_trip_to_a_spawned_worker(two_sets: list[Dataset]) -> None:
    made = pickle.loads(pickle.dumps(mixture(two_sets)))
    assert list(islice(made, 5)) == take(mixture(two_sets), 5)


def test_weights_are_shares_of_samples(two_sets: list[Dataset]) -> None:
    made = mixture(two_sets, batch_size=50)
    counts = Counter(choice for number in range(80) for choice in made.choices(0, number))
    assert abs(counts[0] / 4000 - 0.75) < 0.03


def test_each_dataset_is_read_in_its_own_order(two_sets: list[Dataset]) -> None:
    """Adding a dataset changes how often another one is drawn, never the order of its records."""
    alone = [row for batch in take(mixture(two_sets[:1]), 12) for row in batch]
    mixed = [row for batch in take(mixture(two_sets), 12) for row in batch if row[0] == "big"]
    assert mixed == alone[: len(mixed)] and len(mixed) > 24


def test_augmentation_and_caption_change_from_epoch_to_epoch(two_sets: list[Dataset]) -> None:
    found = [row for batch in take(mixture(two_sets[:1]), 24) for row in batch]
    drawn = Counter(key for _, key, _, _ in found)
    assert set(drawn.values()) == {4}  # 24 records, 96 samples
    assert len(set(found)) > 90
    assert len({(key, caption) for _, key, caption, _ in found}) > 40


def test_global_generators_are_not_touched(two_sets: list[Dataset]) -> None:
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    take(mixture(two_sets), 10)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()


@pytest.fixture
def broken_set(tmp_path: Path) -> list[Dataset]:
    write_shards(tmp_path / "broken", [10, 10], broken={3: b"broken", 4: b"", 15: b"also broken"})
    return [Dataset("broken", str(tmp_path / "broken"), plain)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_record_is_replaced_and_moves_no_other(
    tmp_path: Path, broken_set: list[Dataset], num_workers: int
) -> None:
    write_shards(tmp_path / "whole", [10, 10])
    whole = take(mixture([Dataset("broken", str(tmp_path / "whole"), plain)]), 20)
    made = mixture(broken_set, max_dropped_share=0.5, num_workers=num_workers)
    found = take(made, 20, num_workers)
    bad = {"r000003", "r000004", "r000015"}
    for ours, expected in zip(found, whole, strict=True):
        assert len(ours) == 4
        for row, intended in zip(ours, expected, strict=True):
            assert row[1] not in bad
            assert row == intended or intended[1] in bad


def test_two_broken_records_of_a_batch_get_two_replacements(broken_set: list[Dataset]) -> None:
    for batch in take(mixture(broken_set, max_dropped_share=0.5, batch_size=8), 2):
        assert len({key for _, key, _, _ in batch}) == 8


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_main_process_reads_what_workers_counted(broken_set: list[Dataset], num_workers: int) -> None:
    made = mixture(broken_set, max_dropped_share=0.5, num_workers=num_workers)
    take(made, 20, num_workers)
    counters = made.counters()["broken"]
    assert counters["corrupt_image"] >= 12  # 3 in each of 4 epochs, and what was prefetched
    assert 68 <= counters["used"] <= 68 + 24
    assert counters["bad_json"] == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_broken_records_stop_the_run_with_all_three_parts(broken_set: list[Dataset], num_workers: int) -> None:
    made = mixture(broken_set, max_dropped_share=0.05, num_workers=num_workers)
    with pytest.raises(DataError, match="records of broken cannot be used") as caught:
        take(made, 500, num_workers)
    assert "key r0000" in caught.value.where and "max_dropped_share" in caught.value.fix


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_usable_is_a_data_error(tmp_path: Path, num_workers: int) -> None:
    write_shards(tmp_path, [3], broken=dict.fromkeys(range(3), b"x"))
    made = mixture([Dataset("all", str(tmp_path), plain)], max_dropped_share=1.0, num_workers=num_workers)
    with pytest.raises(DataError, match="in a row of dataset all"):
        take(made, 1, num_workers)


def test_empty_and_duplicate_datasets_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "e" / "x.tar", [])
    (tmp_path / "e" / "index.json").write_text('{"shards": [{"name": "x.tar", "num_records": 0}]}')
    with pytest.raises(DataError, match="dataset e has no records"):
        mixture([Dataset("e", str(tmp_path / "e"), plain)])
    write_shards(tmp_path / "f", [1])
    twice = [Dataset("f", str(tmp_path / "f"), plain)] * 2
    with pytest.raises(ConfigError, match="f, f"):
        mixture(twice)
    with pytest.raises(ConfigError, match="weight 0"):
        Dataset("f", str(tmp_path / "f"), plain, weight=0)
    with pytest.raises(ConfigError, match="batch_size=0"):
        mixture(twice[:1], batch_size=0)


def test_a_corrupt_shard_stops_the_run_and_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [5, 5], index=False)
    paths[1].write_bytes(paths[1].read_bytes()[:3000])
    with pytest.raises(DataError, match=r"s-001\.tar"):
        take(mixture([Dataset("cut", str(tmp_path), plain)]), 5)


def test_small_data_gets_one_stream_and_large_data_several() -> None:
    assert default_num_streams([[Shard("a", 152)]], world_size=1) == 1
    assert default_num_streams([[Shard("a", 1000)] * 118], world_size=1) == 8
    assert default_num_streams([[Shard("a", 1000)] * 118], world_size=8) == 2
    assert default_num_streams([[Shard("a", 1000)] * 118, [Shard("b", 152)]], world_size=1) == 1
    assert default_num_streams([[Shard("a", None)] * 1000], world_size=16) == 8


def test_the_fingerprint_follows_what_decides_the_order(two_sets: list[Dataset], tmp_path: Path) -> None:
    original = mixture(two_sets).fingerprint()
    assert mixture(two_sets, seed=9, num_workers=3).fingerprint() == original
    assert mixture(two_sets, shuffle_buffer=7).fingerprint() != original
    assert mixture(two_sets[::-1]).fingerprint() != original
    heavier = Dataset("small", two_sets[1].urls, plain, weight=2.0)
    assert mixture([two_sets[0], heavier]).fingerprint() != original
    moved = (tmp_path / "big").rename(tmp_path / "elsewhere")
    assert mixture([Dataset("big", str(moved), plain, weight=3.0), two_sets[1]]).fingerprint() == original
