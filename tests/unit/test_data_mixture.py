"""A mixture draws its datasets by weight, each in its own order, and says what its order depends on."""

import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from shard_factory import plain, write_shards, write_tar

from blip2train.data.mixture import Dataset, Mixture
from blip2train.data.shards import Shard
from blip2train.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    write_shards(path / "big", [9, 6, 9], name="b")
    write_shards(path / "small", [5, 5], name="s")
    return path


def datasets(folder: Path, small: float = 1.0) -> list[Dataset]:
    return [
        Dataset("big", str(folder / "big"), plain, weight=3.0),
        Dataset("small", str(folder / "small"), plain, weight=small),
    ]


def mixture(folder: Path, **options: Any) -> Mixture:
    return Mixture(datasets(folder), **({"seed": 7, "num_streams": 4} | options))


def test_draws_number_each_dataset_by_itself(folder: Path) -> None:
    draws = list(islice(mixture(folder).draws(2, 0), 3000))
    for number in (0, 1):
        own = [draw.number for draw in draws if draw.dataset == number]
        assert own == list(range(len(own)))
    assert abs(sum(draw.dataset == 0 for draw in draws) / 3000 - 0.75) < 0.03
    assert {draw.stream for draw in draws} == {2}


@pytest.mark.parametrize("position", [1, 7, 1023, 1024, 1500])
def test_draws_from_a_position_are_those_behind_it(folder: Path, position: int) -> None:
    whole = list(islice(mixture(folder).draws(1, 0), position + 50))
    assert list(islice(mixture(folder).draws(1, position), 50)) == whole[position:]


def test_another_dataset_changes_how_often_one_is_drawn_and_never_its_order(folder: Path) -> None:
    alone = Mixture(datasets(folder)[:1], seed=7, num_streams=4).orders[0]
    mixed = mixture(folder).orders[0]
    assert [alone.record(1, draw) for draw in range(40)] == [mixed.record(1, draw) for draw in range(40)]


def test_temperature_evens_out(folder: Path) -> None:
    draws = islice(mixture(folder, temperature=1e6).draws(0, 0), 4000)
    assert abs(Counter(draw.dataset for draw in draws)[0] / 4000 - 0.5) < 0.03


def test_a_mixture_survives_the_trip_to_a_spawned_worker(folder: Path) -> None:
    made = pickle.loads(pickle.dumps(mixture(folder)))
    assert list(islice(made.draws(0, 3), 5)) == list(islice(mixture(folder).draws(0, 3), 5))


@pytest.mark.parametrize(
    "options",
    [{"seed": 8}, {"num_streams": 2}, {"shuffle_window": 6}, {"temperature": 2.0}],
    ids=lambda item: str(item),
)
def test_the_settings_name_what_decides_the_order(folder: Path, options: dict[str, Any]) -> None:
    before, after = mixture(folder).settings(), mixture(folder, **options).settings()
    assert {name for name in before if before[name] != after[name]} == set(options)


def test_the_settings_follow_weights_and_shards_but_not_the_folder(folder: Path, tmp_path: Path) -> None:
    original = mixture(folder).settings()
    heavier = Mixture(datasets(folder, small=2.0), seed=7, num_streams=4).settings()
    assert {name for name in original if original[name] != heavier[name]} == {"weights"}
    write_shards(tmp_path / "big", [9, 6, 9])
    write_shards(tmp_path / "small", [5, 5])
    assert mixture(tmp_path).settings() == original
    write_shards(tmp_path / "small", [5, 6])
    changed = mixture(tmp_path).settings()
    assert changed["shards"]["small"].startswith("11 records in 2 shards")
    assert {name for name in original if original[name] != changed[name]} == {"shards"}


def test_a_url_may_be_signed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(signature: str) -> dict[str, Any]:
        shards = [Shard(f"https://store/big/{number}.tar?{signature}", 9) for number in range(3)]
        monkeypatch.setattr("blip2train.data.mixture.open_shards", lambda *_: shards)
        return Mixture([Dataset("big", "any", plain)], seed=0).settings()

    assert settings("expires=1&sig=a/b") == settings("expires=2&sig=c/d")


def test_what_is_no_mixture_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="big, big"):
        Mixture(datasets(folder)[:1] * 2, seed=0)
    with pytest.raises(ConfigError, match="datasets: none"):
        Mixture([], seed=0)
    with pytest.raises(ConfigError, match="weight 0"):
        Dataset("f", str(folder), plain, weight=0)
    for name, value in (("num_streams", 0), ("shuffle_window", 0), ("temperature", 0.0)):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            mixture(folder, **{name: value})
    write_tar(tmp_path / "x.tar", [])
    (tmp_path / "index.json").write_text('{"shards": [{"name": "x.tar", "num_records": 0}]}')
    with pytest.raises(DataError, match="dataset e has no records"):
        _ = Mixture([Dataset("e", str(tmp_path), plain)], seed=0).orders
