"""Quickstart in the folder of an earlier one: what it may replace, what it continues, and what it must not touch."""

from pathlib import Path

import pytest

from blip2train.cli.config import compose
from blip2train.cli.quickstart import MARKER, _build_data, _make_room
from blip2train.errors import ConfigError
from blip2train.run_dir import read_json


def test_another_seed_replaces_the_data_of_an_earlier_quickstart(tmp_path: Path) -> None:
    small = [f"out={tmp_path}", "limit=smoke", "sizes.smoke.train_images=6", "sizes.smoke.val_images=3"]
    manifest = tmp_path / "data" / "microworld" / "microworld.json"
    made = []
    for seed in (0, 1, 1):
        _build_data(compose("quickstart", [*small, f"seed={seed}"]), tmp_path)
        made.append((read_json(manifest)["world"]["seed"], manifest.stat().st_mtime_ns))
    assert [seed for seed, _ in made] == [0, 1, 1]
    assert made[1] == made[2], "the same world is not made twice"


def test_runs_that_no_quickstart_made_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "precious").write_text("weights of a week")
    with pytest.raises(ConfigError, match="no quickstart made"):
        _make_room(compose("quickstart", [f"out={tmp_path}"]), tmp_path)
    assert (tmp_path / "stage1" / "precious").is_file()


def test_an_interrupted_quickstart_is_continued_and_a_finished_one_starts_afresh(tmp_path: Path) -> None:
    config = compose("quickstart", [f"out={tmp_path}"])
    _make_room(config, tmp_path)
    half = tmp_path / "stage1" / "checkpoints"
    half.mkdir(parents=True)
    _make_room(config, tmp_path)
    assert half.is_dir(), "the same command continues"
    _make_room(compose("quickstart", [f"out={tmp_path}", "seed=1"]), tmp_path)
    assert not half.exists(), "other settings start afresh"
    half.mkdir(parents=True)
    (tmp_path / "summary.json").write_text("{}")
    _make_room(compose("quickstart", [f"out={tmp_path}", "seed=1"]), tmp_path)
    assert not half.exists() and not (tmp_path / "summary.json").exists(), "a finished one starts afresh"
    assert read_json(tmp_path / MARKER)["seed"] == 1
