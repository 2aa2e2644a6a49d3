"""Checkpoints hold trainable weights only, come back bit-equal, and never hide a surprise."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from blip2train.checkpoint.find import find_checkpoint, list_checkpoints
from blip2train.checkpoint.io import WEIGHTS, load_weights, save_checkpoint
from blip2train.errors import CheckpointError
from blip2train.model.freezing import freeze
from blip2train.run_dir import RunDir


class Bridge(nn.Module):
    """A frozen part and a trainable one, as both stages have."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.frozen = nn.Linear(100, 100)
        self.projection = nn.Linear(width, 3)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        freeze(self.frozen)


def test_holds_only_trainable_weights_and_its_size_says_so(tmp_path: Path) -> None:
    weights = save_checkpoint(Bridge(), tmp_path / "step-0000001", {"stage": 1})
    with safe_open(weights, framework="pt") as file:
        assert set(file.keys()) == {"projection.weight", "projection.bias", "temperature"}
        assert json.loads(file.metadata()["blip2train"])["parameters"] == 4 * 3 + 3 + 1
    assert weights.stat().st_size < 2_000 < 100 * 100 * 4


def test_round_trip_is_bit_equal_and_leaves_frozen_parts_alone(tmp_path: Path) -> None:
    source, target = Bridge(), Bridge()
    frozen_before = target.frozen.weight.clone()
    report = load_weights(target, save_checkpoint(source, tmp_path, {}))
    assert torch.equal(target.projection.weight, source.projection.weight)
    assert torch.equal(target.temperature, source.temperature)
    assert torch.equal(target.frozen.weight, frozen_before)
    assert report.counts() == {"checkpoint": 3} and not report.dropped


def test_unexpected_missing_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    weights = save_checkpoint(Bridge(width=4), tmp_path, {})
    other = Bridge(width=5)
    other.extra = nn.Linear(2, 2)
    del other.temperature
    with pytest.raises(CheckpointError) as caught:
        load_weights(other, weights)
    text = str(caught.value)
    assert "unexpected in the file: temperature" in text
    assert "missing from the file: extra.weight" in text
    assert "projection.weight: the file has (3, 4), the model (3, 5)" in text


def test_a_refused_load_changes_nothing(tmp_path: Path) -> None:
    weights = save_checkpoint(Bridge(), tmp_path, {})
    other = Bridge()
    other.extra = nn.Linear(2, 2)
    before = other.projection.weight.clone()
    with pytest.raises(CheckpointError):
        load_weights(other, weights)
    assert torch.equal(other.projection.weight, before)


def test_stage_change_is_allowed_only_where_it_is_named(tmp_path: Path) -> None:
    weights = save_checkpoint(Bridge(), tmp_path, {})
    target = nn.Module()
    target.temperature = nn.Parameter(torch.tensor(1.0))
    target.fresh = nn.Linear(2, 2)
    report = load_weights(target, weights, leave=("projection.*",), fresh=("fresh.*",))
    assert report.names("checkpoint") == ["temperature"]
    assert list(report.dropped) == ["projection.bias", "projection.weight"]
    assert report.names("random") == ["fresh.bias", "fresh.weight"]
    assert "left behind: 2" in report.summary() and str(weights) in report.summary()


def test_what_was_trained_and_is_frozen_now_is_loaded_too(tmp_path: Path) -> None:
    """A vision encoder trained in stage 1, in half precision and frozen in stage 2, is the trained one."""
    source, target = Bridge(), Bridge()
    source.frozen.requires_grad_(True)
    target.frozen.half()
    report = load_weights(target, save_checkpoint(source, tmp_path, {}))
    assert torch.equal(target.frozen.weight, source.frozen.weight.half())
    assert report.origins["frozen.weight"] == "checkpoint" and not target.frozen.weight.requires_grad


def test_what_starts_training_now_keeps_its_own_weights_where_that_is_named(tmp_path: Path) -> None:
    source, target = Bridge(), Bridge()
    target.frozen.requires_grad_(True)
    weights = save_checkpoint(source, tmp_path, {})
    before = target.frozen.weight.detach().clone()
    with pytest.raises(CheckpointError, match="missing from the file: frozen.weight"):
        load_weights(target, weights)
    report = load_weights(target, weights, fresh=("frozen.*",))
    assert torch.equal(target.frozen.weight, before) and report.origins["frozen.weight"] == "random"


def test_truncated_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    weights = save_checkpoint(Bridge(), tmp_path, {})
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_weights(Bridge(), weights)


def test_only_complete_checkpoints_are_listed_and_unknown_names_list_the_known(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (20, 100):
        save_checkpoint(Bridge(), run.checkpoints / f"step-{step:07d}", {"step": step})
    (run.checkpoints / ".step-0000200.partial").mkdir()
    assert [folder.name for folder in list_checkpoints(run)] == ["step-0000020", "step-0000100"]
    assert find_checkpoint(run).name == "step-0000100"
    with pytest.raises(CheckpointError, match="known: step-0000020, step-0000100"):
        find_checkpoint(run, "step-0000007")


def test_full_disk_says_how_much_room_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blip2train.checkpoint.io.save_file", no_space)
    with pytest.raises(CheckpointError, match="the disk is full; .* MB free"):
        save_checkpoint(Bridge(), tmp_path / "step-0000001", {})
    assert not (tmp_path / "step-0000001" / WEIGHTS).exists()
