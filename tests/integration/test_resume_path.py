"""`resume=PATH`: a run goes back to an older checkpoint of its own, or goes on in a new folder; nothing is lost."""

import json
import shutil
from pathlib import Path

import pytest

from blip2train.checkpoint.find import find_checkpoint, list_checkpoints
from blip2train.checkpoint.io import TRAINER_STATE, WEIGHTS
from blip2train.errors import CheckpointError, ConfigError
from blip2train.run_dir import RunDir, read_json

SETTINGS = (
    *("checkpoint.every_steps=2", "checkpoint.keep_last=0", "checkpoint.best_metric=train/loss"),
    "trainer.max_steps=6",
)


@pytest.fixture(scope="module")
def whole(laboratory, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Six steps with a checkpoint after every second."""
    folder = tmp_path_factory.mktemp("resume_path") / "whole"
    return laboratory.train("microworld_stage1", folder, *SETTINGS).run


@pytest.fixture
def run(whole: RunDir, tmp_path: Path) -> RunDir:
    shutil.copytree(whole.path, tmp_path / "run")
    return RunDir(tmp_path / "run")


def names(run: RunDir) -> list[str]:
    return [folder.name for folder in list_checkpoints(run)]


def losses(run: RunDir) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in run.read_metrics()]


def weights(run: RunDir) -> bytes:
    return (find_checkpoint(run) / WEIGHTS).read_bytes()


def test_back_to_an_older_checkpoint_keeps_the_newer_ones_aside(laboratory, whole: RunDir, run: RunDir) -> None:
    back = f"resume={run.checkpoints / 'step-0000002'}"
    laboratory.train("microworld_stage1", run.path, *SETTINGS, back)
    assert weights(run) == weights(whole) and losses(run) == losses(whole)
    aside = run.checkpoints / "superseded-1"
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.jsonl", "step-0000004", "step-0000006"]
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == 6
    state = (find_checkpoint(run) / TRAINER_STATE).stat().st_mtime_ns
    laboratory.train("microworld_stage1", run.path, *SETTINGS, back)
    assert not (run.checkpoints / "superseded-2").exists(), "a launcher that repeats the command goes on"
    assert (find_checkpoint(run) / TRAINER_STATE).stat().st_mtime_ns == state


def test_another_runs_checkpoint_is_continued_in_a_new_folder(laboratory, whole: RunDir, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.path.rglob("*") if path.is_file()}
    new, resume = RunDir(tmp_path / "new"), f"resume={whole.checkpoints / 'step-0000004'}"
    laboratory.train("microworld_stage1", new.path, *SETTINGS, resume)
    assert weights(new) == weights(whole) and losses(new) == losses(whole)
    assert names(new) == sorted({find_best(whole, upto=4), "step-0000004", "step-0000006"})
    note = read_json(new.manifest_path)["continued_from"]
    assert note["checkpoint"] == "step-0000004" and note["path"] == str(whole.checkpoints / "step-0000004")
    assert read_json(new.init_path) == read_json(whole.init_path)
    laboratory.train("microworld_stage1", new.path, *SETTINGS, resume)
    assert weights(new) == weights(whole)
    assert {path: path.stat().st_mtime_ns for path in whole.path.rglob("*") if path.is_file()} == before
    laboratory.train("microworld_stage1", new.path, *SETTINGS, "resume=auto")
    with pytest.raises(ConfigError, match="already holds step-0000006, and is no continuation of"):
        laboratory.train("microworld_stage1", new.path, *SETTINGS, f"resume={whole.path}")


def find_best(run: RunDir, upto: int) -> str:
    loss = {step: value for step, value in losses(run) if step % 2 == 0 and step <= upto}
    return f"step-{min(loss, key=loss.__getitem__):07d}"


@pytest.mark.slow
def test_a_takeover_that_was_killed_is_taken_up_again(laboratory, whole: RunDir, tmp_path: Path) -> None:
    """As a kill leaves it: the record is there, of the checkpoints the best alone."""
    new, path = RunDir(tmp_path / "new"), whole.checkpoints / "step-0000004"
    laboratory.train("microworld_stage1", new.path, *SETTINGS, f"resume={path}")
    for folder in list_checkpoints(new)[1:]:
        shutil.rmtree(folder)
    list_checkpoints(new)[0].rename(new.checkpoints / "step-0000002")
    laboratory.train("microworld_stage1", new.path, *SETTINGS, f"resume={path}")
    assert names(new)[-2:] == ["step-0000004", "step-0000006"] and weights(new) == weights(whole)


def test_a_damaged_checkpoint_is_passed_over_and_kept_for_a_look(
    laboratory, whole: RunDir, run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    torn = run.checkpoints / "step-0000006" / TRAINER_STATE
    torn.write_bytes(torn.read_bytes()[:-100])
    laboratory.train("microworld_stage1", run.path, *SETTINGS)
    assert "step-0000006 is passed over: trainer.ckpt has" in caplog.text
    assert weights(run) == weights(whole) and losses(run) == losses(whole)
    assert (run.checkpoints / "damaged-1" / "step-0000006").is_dir() and names(run)[-1] == "step-0000006"


def test_a_damaged_one_that_was_named_is_refused(laboratory, run: RunDir) -> None:
    (run.checkpoints / "step-0000004" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="step-0000004 is damaged: model.safetensors is missing"):
        laboratory.train("microworld_stage1", run.path, *SETTINGS, "resume=step-0000004")


def test_paths_that_are_no_run_are_refused_with_what_is_near(laboratory, run: RunDir, tmp_path: Path) -> None:
    def refused(resume: object) -> str:
        with pytest.raises(ConfigError) as caught:
            laboratory.train("microworld_stage1", run.path, *SETTINGS, f"resume={resume}")
        return str(caught.value)

    assert "Did you mean auto?" in refused("atuo")
    assert "Did you mean" in refused(run.checkpoints / "step-0000005")
    assert "this run has step-0000002, step-0000004, step-0000006" in refused("step-0000001")
    assert "is a file" in refused(run.checkpoints / "step-0000004" / WEIGHTS)
    assert "no run in" in refused(tmp_path)
    aside = shutil.copytree(run.checkpoints / "step-0000004", run.checkpoints / "superseded-1" / "step-0000004")
    assert f"move it to {run.checkpoints}, " in refused(aside)
    assert "apart from its run" in refused(shutil.copytree(aside, run.path / "old" / "step-0000004"))
    without = read_json(run.manifest_path)
    assert "continued_from" not in without, "a refused start leaves no trace"


def test_another_setting_is_refused_before_anything_is_moved(laboratory, run: RunDir) -> None:
    with pytest.raises(ConfigError, match="optim.lr"):
        laboratory.train("microworld_stage1", run.path, *SETTINGS, "resume=step-0000002", "optim.lr=0.5")
    assert names(run) == ["step-0000002", "step-0000004", "step-0000006"]
    assert not (run.checkpoints / "superseded-1").exists()


def test_a_torn_record_does_not_stop_a_resume(laboratory, whole: RunDir, run: RunDir) -> None:
    """What a kill leaves: half a line in both logs, leftovers of a checkpoint and of a file being replaced."""
    shutil.rmtree(run.checkpoints / "step-0000006")
    for path in (run.metrics_path, run.dropped_path):
        with path.open("a") as file:
            file.write('{"step": 6, "tra')
    leftover = run.checkpoints / ".step-0000006.partial"
    leftover.mkdir()
    (leftover / WEIGHTS).write_bytes(b"half")
    laboratory.train("microworld_stage1", run.path, *SETTINGS)
    assert weights(run) == weights(whole) and losses(run) == losses(whole)
    assert json.loads(run.metrics_path.read_text().splitlines()[-1])["step"] == 6
    assert not leftover.exists() and run.dropped_path.read_text() == ""
