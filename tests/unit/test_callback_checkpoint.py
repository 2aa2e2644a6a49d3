"""Checkpoints come when they should, the right ones stay, and a disk that refuses costs none of those before."""

import json
import logging
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader
from two_ranks import on_two_ranks

from blip2train.callback import checkpoint
from blip2train.callback.checkpoint import CheckpointCallback, estimated_bytes, last_values, waits
from blip2train.checkpoint.find import find_checkpoint, list_checkpoints
from blip2train.checkpoint.io import TRAINER_STATE, WEIGHTS, read_metadata, read_weights
from blip2train.errors import CheckpointError, ConfigError
from blip2train.run_dir import RunDir


class Line(pl.LightningModule):
    """A weight that is the number of steps, and enough of it that a file limit can be in its midst."""

    strict_loading = False

    def __init__(self, before_step: Callable[[int], None] = lambda step: None) -> None:
        super().__init__()
        self.model, self.before_step = nn.Linear(20_000, 1, bias=False), before_step
        nn.init.zeros_(self.model.weight)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.before_step(self.trainer.global_step + 1)
        return -self.model.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def on_save_checkpoint(self, state: dict[str, Any]) -> None:
        state["state_dict"] = {}


def fit(callback: CheckpointCallback, steps: int, before_step: Callable[[int], None] = lambda step: None) -> None:
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[callback],
    )
    trainer.fit(Line(before_step), DataLoader(torch.ones(100, 1)))


def steps_of(run: RunDir) -> list[int]:
    return [int(read_metadata(folder)["step"]) for folder in list_checkpoints(run)]


def test_weights_and_trainer_state_are_of_the_same_step_and_old_ones_go(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    fit(CheckpointCallback(run, every_steps=2, keep_last=2, metadata={"stage": 1}), 7)
    assert steps_of(run) == [6, 7], "the last step is saved as well"
    for folder in list_checkpoints(run):
        step = read_metadata(folder)["step"]
        assert read_weights(folder / WEIGHTS)["weight"].unique().tolist() == [step]
        assert torch.load(folder / TRAINER_STATE, weights_only=True)["global_step"] == step
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-0000006", "step-0000007"]


def test_the_best_one_stays_beside_the_last_ones(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 1.0}

    def log(step: int) -> None:
        with run.metrics_path.open("a") as file:
            file.write(json.dumps({"step": step, "train/loss": losses[step]}) + "\n")

    fit(CheckpointCallback(run, every_steps=1, keep_last=1, best_metric="train/loss"), 5, log)
    assert steps_of(run) == [2, 5], "of two that are as good the first stays"
    assert find_checkpoint(run, "best").name == "step-0000002"
    assert read_metadata(find_checkpoint(run, "best"))["metric"] == {"name": "train/loss", "mode": "min", "value": 1.0}


def test_a_metric_that_is_not_logged_is_said_with_the_nearest_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDir(tmp_path)
    run.metrics_path.write_text('{"step": 1, "train/loss": 1.0}\n')
    fit(CheckpointCallback(run, every_steps=0, best_metric="train/los"), 1)
    assert "has no 'train/los' yet; did you mean train/loss?" in caplog.text and steps_of(run) == [1]


def test_minutes_are_those_since_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))

    def tick(step: int) -> None:
        nonlocal now
        now += 60.0

    run = RunDir(tmp_path)
    fit(CheckpointCallback(run, every_steps=5, every_minutes=3, keep_last=0), 10, tick)
    assert steps_of(run) == [3, 5, 8, 10]


def full_from(size: int) -> None:
    """Writes beyond `size` bytes of a file fail from here on; 0 lifts that."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or hard, hard))


@pytest.mark.parametrize("size", [1, 1_000, 50_000], ids=["at once", "in the trainer's state", "in the weights"])
def test_a_disk_that_refuses_costs_one_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int) -> None:
    run = RunDir(tmp_path)
    callback = CheckpointCallback(run, every_steps=2, keep_last=3, retry_steps=1)
    seen: dict[int, list[str]] = {}

    def step(number: int) -> None:
        seen[number] = sorted(path.name for path in tmp_path.glob("checkpoints/*"))
        full_from(size if number == 4 else 0)

    try:
        with caplog.at_level(logging.ERROR):
            fit(callback, 7, step)
    finally:
        full_from(0)
    assert seen[5] == ["step-0000002"], "the one before stands, and nothing half written beside it"
    assert steps_of(run) == [5, 6, 7]
    assert caplog.text.count("could not write a checkpoint") == 1
    assert "File too large" in caplog.text and "training goes on; step 5 tries again" in caplog.text


def test_the_end_waits_for_room_and_then_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=waited.append)
    monkeypatch.setattr(checkpoint, "time", clock)
    run = RunDir(tmp_path)

    def no_space(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("blip2train.checkpoint.io.save_file", no_space)
        with pytest.raises(CheckpointError, match="the disk is full.*\n.*\n.*free some space"):
            fit(CheckpointCallback(run, every_steps=0, final_wait_minutes=0.5), 2)
    assert waited == [5.0, 10.0, 15.0] and steps_of(run) == []
    assert not list(run.checkpoints.glob(".*"))


def test_room_that_comes_while_the_end_waits_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checkpoint, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: full_from(0))
    )
    run = RunDir(tmp_path)
    try:
        fit(CheckpointCallback(run, every_steps=0), 2, lambda step: full_from(1000 if step == 2 else 0))
    finally:
        full_from(0)
    assert steps_of(run) == [2]


def on_each_rank(rank: int, folder: str) -> tuple[str, str, list[int]]:
    """What is said of different starts and of a disk that rank 0 cannot write to; the steps that a clock asks for."""
    run = RunDir(Path(folder))
    apart = CheckpointCallback(run, every_steps=1, resumed=run.checkpoints / "step-0000004" if rank == 0 else None)
    with pytest.raises(CheckpointError) as caught:
        apart.setup(SimpleNamespace(strategy=SimpleNamespace()), None, "fit")  # type: ignore[arg-type]

    callback = CheckpointCallback(run, every_steps=0, every_minutes=1, trainer_state=False)
    trainer: Any = SimpleNamespace(global_step=3, lightning_module=Line(), strategy=None)
    full_from(100 if rank == 0 else 0)
    refused = callback._save(trainer)
    full_from(0)
    assert callback._save(trainer) is None

    callback._clock, due = checkpoint.Agreement("checkpoint"), []
    late, early = -1e9, time.monotonic()
    callback._last_time = early if rank == 0 else late  # rank 1's clock says at every step that it is time
    for step in range(1, 8):
        if rank == 0 and step == 3:
            callback._last_time = late
        if callback._is_due(step):
            due.append(step)
            callback._last_time, callback._said_late = (early if rank == 0 else late), False
    return caught.value.found, str(refused), due


def test_two_ranks_agree_on_where_and_when_and_whether_it_worked(tmp_path: Path) -> None:
    found = on_two_ranks(on_each_rank, tmp_path, str(tmp_path / "run"))
    apart = "ranks start from different checkpoints: rank 0 from step-0000004, rank 1 from no checkpoint"
    assert found[0] == found[1] and found[0][0] == apart
    assert "could not write a checkpoint" in found[0][1] and steps_of(RunDir(tmp_path / "run")) == [3]
    assert found[0][2] == [4], "rank 0's clock decides, and the others know a step later"


@pytest.mark.parametrize(
    ("setting", "value"), [("every_steps", -1), ("retry_steps", 0), ("every_minutes", 0), ("best_mode", "lowest")]
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path, setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{setting} is"):
        CheckpointCallback(RunDir(tmp_path), **{"every_steps": 1, setting: value})  # type: ignore[arg-type]


def test_weights_and_two_moments_for_each_kept_checkpoint_and_the_one_being_written() -> None:
    assert estimated_bytes(1_000_000, kept=2, trainer_state=True) == 3 * 12_000_000


def test_keeping_fewer_and_leaving_the_trainers_state_out_both_help() -> None:
    assert estimated_bytes(1_000_000, kept=1, trainer_state=True) == 2 * 12_000_000
    assert estimated_bytes(1_000_000, kept=2, trainer_state=False) == 3 * 4_000_000


def test_waits_double_and_end_with_the_time_given() -> None:
    assert list(waits(40)) == [5, 10, 20, 5] and list(waits(0)) == []


def test_last_values_are_read_from_the_end_and_past_a_torn_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_TAIL_BYTES", 75)
    metrics = tmp_path / "metrics.jsonl"
    assert last_values(metrics) == {}
    rows = [{"step": 1, "early": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "other": 7.0}]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    assert last_values(metrics) == {"step": 3, "loss": 0.5, "other": 7.0}
