"""The samples of a run are the same sequence whoever reads them; broken records move no other one."""

import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_factory import plain, write_shards

from blip2train.batch import Sample
from blip2train.data.drop import Drop
from blip2train.data.mixture import Dataset, Mixture
from blip2train.data.sharing import Shape
from blip2train.data.stream import Part, PartStream
from blip2train.errors import ConfigError, DataError

Rows = list[tuple[str, str, str, int]]


def rows(samples: list[Sample]) -> Rows:
    """Everything that is drawn for a sample: who, which caption, what the augmentation got."""
    return [(sample.dataset, sample.key, sample.caption, int(sample.image[0, 0, 0])) for sample in samples]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    write_shards(path / "big", [9, 6, 9], name="b")
    write_shards(path / "small", [5, 5], name="s", broken={3: b"broken"})
    write_shards(path / "whole", [10, 10])
    write_shards(path / "broken", [10, 10], broken={3: b"broken", 4: b"", 15: b"also broken"})
    return path


def mixture(folder: Path, *names: str, **options: Any) -> Mixture:
    made = [Dataset(name, str(folder / name), plain, 1.0 + 2 * (name == "big")) for name in names or ("big", "small")]
    return Mixture(made, **({"seed": 7, "num_streams": 12, "shuffle_window": 4} | options))


class _Worker:
    """Stands for a DataLoader worker in this process."""

    def __init__(self, number: int, count: int) -> None:
        self.id, self.num_workers = number, count


def parts(
    monkeypatch: pytest.MonkeyPatch, made: Mixture, worker: int, shape: Shape, count: int, first_sample: int = 0
) -> list[Part[Rows]]:
    info = _Worker(worker, shape.num_workers) if shape.num_workers > 1 else None
    with monkeypatch.context() as patch:
        patch.setattr("blip2train.data.stream.get_worker_info", lambda: info)
        return list(islice(PartStream(made, rows, shape, first_sample), count))


def sequence(
    monkeypatch: pytest.MonkeyPatch, made: Mixture, ranks: int, workers: int, size: int, first: int = 0, count: int = 12
) -> Rows:
    """The global sequence of samples: batches put together from parts, ranks interleaved row by row."""
    by_rank = []
    for rank in range(ranks):
        shape = Shape(rank, ranks, workers, size)
        own = [parts(monkeypatch, made, worker, shape, count, first) for worker in range(workers)]
        batches: Rows = []
        for brought in zip(*own, strict=True):
            batch: list[Any] = [None] * size
            for part in brought:
                if part.rows is not None:
                    batch[part.first :: workers] = part.rows
            assert None not in batch
            batches += batch
        by_rank.append(batches)
    return [row for together in zip(*by_rank, strict=True) for row in together]


@pytest.mark.parametrize(
    ("ranks", "workers", "size"), [(1, 4, 8), (2, 2, 4), (2, 1, 3), (3, 2, 5), (1, 12, 4), (4, 3, 2)]
)
def test_ranks_workers_and_batch_size_leave_the_sequence_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, workers: int, size: int
) -> None:
    made = mixture(folder)
    expected = sequence(monkeypatch, made, 1, 1, 8)
    found = sequence(monkeypatch, made, ranks, workers, size)
    both = min(len(found), len(expected))
    assert both >= 48 and found[:both] == expected[:both]


def test_any_sample_may_be_the_first_in_any_shape(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = mixture(folder)
    expected = sequence(monkeypatch, made, 1, 1, 12, count=20)
    for first in (0, 2, 12, 26, 100):
        for ranks, workers, size in ((1, 1, 5), (2, 3, 4), (1, 4, 3)):
            found = sequence(monkeypatch, made, ranks, workers, size, first, count=6)
            assert found == expected[first : first + len(found)]


def test_one_dataset_is_gone_through_once_before_anything_comes_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sequence(monkeypatch, mixture(folder, "big"), 2, 2, 4, count=12)
    for start in (0, 24, 48, 72):
        assert len({key for _, key, _, _ in found[start : start + 24]}) == 24


def test_augmentation_and_caption_change_from_epoch_to_epoch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sequence(monkeypatch, mixture(folder, "big"), 1, 1, 8)
    assert set(Counter(key for _, key, _, _ in found).values()) == {4}  # 24 records, 96 samples
    assert len(set(found)) > 90
    assert len({(key, caption) for _, key, caption, _ in found}) > 40


@pytest.mark.parametrize("workers", [1, 3])
def test_a_broken_record_is_replaced_and_moves_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    bad = {"r000003", "r000004", "r000015"}
    whole_set, broken_set = ([Dataset("x", str(folder / name), plain)] for name in ("whole", "broken"))
    settings = {"seed": 7, "num_streams": 12, "shuffle_window": 4}
    whole = sequence(monkeypatch, Mixture(whole_set, **settings), 1, 1, 4, count=20)
    found = sequence(monkeypatch, Mixture(broken_set, **settings), 1, workers, 4, count=20)
    assert {key for _, key, _, _ in found}.isdisjoint(bad)
    places = [place for place, row in enumerate(whole) if row[1] in bad]
    assert len(places) == 12  # 3 in each of 4 epochs
    untouched = [place for place in range(80) if place not in places]
    assert [found[place][1] for place in untouched] == [whole[place][1] for place in untouched]
    assert found == sequence(monkeypatch, Mixture(broken_set, **settings), 2, 2, 5, count=8)


def test_each_part_says_what_it_drew_and_dropped_in_its_own_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = mixture(folder)
    drawn: Counter[str] = Counter()
    drops: list[Drop] = []
    for worker in range(2):
        for part in parts(monkeypatch, made, worker, Shape(0, 1, 2, 7), 30):
            drawn.update(part.drawn)
            drops += part.drops
    order = sequence(monkeypatch, made, 1, 1, 7, count=30)
    assert drawn == Counter(name for name, *_ in order) and sum(drawn.values()) == 210
    assert {(drop.dataset, drop.key, drop.cause) for drop in drops} == {("small", "s000003", "corrupt_image")}
    places = [made.orders[1].record(draw.stream, draw.number) for draw in draws_of(made, "small", 210)]
    assert len(drops) == sum((place.shard, place.index) == (0, 3) for place in places) > 0
    assert all(drop.sample is not None and order[drop.sample][0] == "small" for drop in drops)


def draws_of(made: Mixture, name: str, count: int) -> list[Any]:
    streams = [made.draws(stream, 0) for stream in range(made.num_streams)]
    draws = [next(streams[number % made.num_streams]) for number in range(count)]
    return [draw for draw in draws if made.datasets[draw.dataset].name == name]


def test_global_generators_are_not_touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    sequence(monkeypatch, mixture(folder), 1, 1, 4)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()


def test_nothing_usable_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "all", [3], broken=dict.fromkeys(range(3), b"x"))
    with pytest.raises(DataError, match="none of 3 records of dataset all can be used; the first is dropped"):
        sequence(monkeypatch, mixture(tmp_path, "all"), 1, 1, 1)


def test_a_cut_shard_loses_its_last_records_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_shards(tmp_path / "cut", [8, 8])
    paths[1].write_bytes(paths[1].read_bytes()[: paths[1].stat().st_size // 3])
    made = mixture(tmp_path, "cut")
    found = parts(monkeypatch, made, 0, Shape(0, 1, 1, 16), 1)[0]
    assert found.rows is not None and len(found.rows) == 16
    causes = Counter(drop.cause for drop in found.drops)
    assert set(causes) == {"truncated_shard"} and 4 <= causes["truncated_shard"] <= 7
    assert all(drop.url == str(paths[1]) for drop in found.drops)


def test_readers_that_cannot_share_the_streams_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="12 streams cannot be shared evenly by 2 ranks x 4 workers"):
        PartStream(mixture(folder), rows, Shape(0, 2, 4, 8), 0)
