"""A checkpoint that is torn, truncated, bit-flipped or without a file is found out, and the one before it is used."""

import json
import logging
from pathlib import Path

import pytest
import torch

from blip2train.checkpoint.find import find_checkpoint, rank_by_metric
from blip2train.checkpoint.io import METADATA, TRAINER_STATE, WEIGHTS, save_weights
from blip2train.checkpoint.verify import problems
from blip2train.errors import CheckpointError
from blip2train.run_dir import RunDir


def write(run: RunDir, step: int, **facts: object) -> Path:
    """A small checkpoint with both files, as training leaves it."""
    folder = run.checkpoints / f"step-{step:07d}"
    folder.mkdir(parents=True)
    torch.save({"global_step": step, "moment": torch.full((7,), float(step))}, folder / TRAINER_STATE)
    save_weights({"weight": torch.full((5,), float(step))}, folder, {"step": step, **facts})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def test_a_whole_checkpoint_has_no_problems(run: RunDir) -> None:
    assert problems(write(run, 1)) == []


@pytest.mark.parametrize("name", [METADATA, WEIGHTS, TRAINER_STATE])
def test_a_flipped_bit_anywhere_is_found(run: RunDir, name: str) -> None:
    path = write(run, 1) / name
    whole = path.read_bytes()
    missed = []
    for position in range(len(whole)):
        torn = bytearray(whole)
        torn[position] ^= 1 << position % 8
        path.write_bytes(torn)
        if not problems(path.parent):
            missed.append(position)
    assert not missed
    path.write_bytes(whole)
    assert problems(path.parent) == []


@pytest.mark.parametrize("name", [METADATA, WEIGHTS, TRAINER_STATE])
def test_a_file_cut_short_or_lengthened_or_missing_is_found(run: RunDir, name: str) -> None:
    path = write(run, 1) / name
    whole = path.read_bytes()
    # the metadata's last bytes are a brace and a newline, and without the newline it still says all it said
    lengths = [0, 1, len(whole) // 3, len(whole) - 2]
    for torn in (*(whole[:length] for length in lengths), whole + b"\0"):
        path.write_bytes(torn)
        assert len(problems(path.parent)) == 1
    path.unlink()
    assert problems(path.parent) == [f"{name} is missing"]


def test_a_file_of_another_step_is_found(run: RunDir) -> None:
    first, second = write(run, 1), write(run, 2)
    (second / WEIGHTS).write_bytes((first / WEIGHTS).read_bytes())
    assert problems(second) == [f"{WEIGHTS} is damaged: its SHA-256 does not fit"]


def test_the_last_whole_one_is_taken_and_the_damaged_one_named(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        write(run, step)
    (run.checkpoints / "step-0000003" / METADATA).unlink()
    torn = run.checkpoints / "step-0000002" / TRAINER_STATE
    torn.write_bytes(torn.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(run, files=None).name == "step-0000001"
    said = caplog.text
    assert "step-0000003 is passed over: metadata.json is missing" in said
    assert "step-0000002 is passed over: trainer.ckpt has" in said and "taking step-0000001 instead" in said
    assert find_checkpoint(run).name == "step-0000002", "an evaluation needs the weights alone"


def test_a_damaged_one_that_was_asked_for_is_refused(run: RunDir) -> None:
    weights = write(run, 1) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="step-0000001 is damaged: model.safetensors is damaged"):
        find_checkpoint(run, "step-0000001")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is whole:\n +step-0000001: model.safetensors"):
        find_checkpoint(run)


def test_without_checksums_it_is_read_as_far_as_the_formats_allow(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(run, 1)
    facts = json.loads((folder / METADATA).read_text())
    (folder / METADATA).write_text(json.dumps({k: v for k, v in facts.items() if k not in ("files", "checksum")}))
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(run, files=None) == folder
    assert caplog.text.count("written without checksums") == 1
    state = (folder / TRAINER_STATE).read_bytes()
    moment = state.index(torch.full((7,), 1.0).numpy().tobytes())
    (folder / TRAINER_STATE).write_bytes(state[:moment] + b"\xff" + state[moment + 1 :])
    assert "trainer.ckpt is damaged in" in problems(folder)[0]
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    assert len(problems(folder)) == 2


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 3)])
def test_the_best_is_by_the_metric_of_the_newest(run: RunDir, mode: str, best: int) -> None:
    write(run, 1, metric={"name": "other", "mode": "min", "value": -100.0})
    for step, value in ((2, 0.5), (3, 0.9), (4, 0.6)):
        write(run, step, metric={"name": "loss", "mode": mode, "value": value})
    write(run, 5, metric={"name": "loss", "mode": mode, "value": float("nan")})
    write(run, 6)
    assert find_checkpoint(run, "best").name == f"step-{best:07d}"
    other = rank_by_metric(sorted(run.checkpoints.iterdir()), "other")
    assert [folder.name for folder in other] == ["step-0000001"]


def test_a_damaged_best_gives_way_to_the_second(run: RunDir) -> None:
    for step, value in ((1, 0.5), (2, 0.9)):
        write(run, step, metric={"name": "loss", "mode": "min", "value": value})
    (run.checkpoints / "step-0000001" / WEIGHTS).unlink()
    assert find_checkpoint(run, "best").name == "step-0000002"


def test_no_best_where_nothing_was_measured(run: RunDir) -> None:
    write(run, 1)
    with pytest.raises(CheckpointError, match="no checkpoint of this run has a metric"):
        find_checkpoint(run, "best")
    with pytest.raises(CheckpointError, match="did you mean best"):
        find_checkpoint(run, "bets")
