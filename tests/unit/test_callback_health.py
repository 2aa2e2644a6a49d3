"""Every warning is provoked in a small training, once; a healthy one is left alone, and a resumed one says the same."""

import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny_training import Batches, TinyModule, fit
from two_ranks import on_two_ranks

from blip2train.callback.bad_step import BadStepRecorder
from blip2train.callback.finite import FiniteCallback
from blip2train.callback.health import HealthCallback
from blip2train.callback.metrics import MetricsCallback
from blip2train.callback.step_clock import StepClock
from blip2train.callback.warning_log import WarningLog
from blip2train.health.finding import Finding
from blip2train.health.rule import Setting
from blip2train.run_dir import RunDir, write_text


def guards(run: Path, settle: int = 20, wait: float = 1.0, look: int = 10) -> list[pl.Callback]:
    """The callbacks of a training as the command line puts them together, logging every second step."""
    warnings, clock = WarningLog(RunDir(run)), StepClock()
    setting = Setting(settle_steps=settle, max_data_wait=wait, min_temperature=1e-3)
    health = HealthCallback(warnings, setting, spike_size=10.0, weights_every_steps=look)
    finite = FiniteCallback(BadStepRecorder(RunDir(run)), warnings, 10, health.on_step)
    return [finite, health, MetricsCallback(2, clock, watch=health.on_entry), clock]


def said(run: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["cause"]) for row in RunDir(run).read_warnings()]


class At(pl.Callback):
    """Does something to the training once a batch, after the backward pass."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.action(trainer, pl_module)


def test_a_healthy_training_is_left_alone(tmp_path: Path) -> None:
    fit(TinyModule(max_steps=150), guards(tmp_path), max_steps=150)
    assert said(tmp_path) == []


def test_a_frozen_weight_that_moved_is_named_at_the_next_look(tmp_path: Path) -> None:
    def perturb(module: TinyModule, index: int) -> None:
        if index == 13:
            with torch.no_grad():
                module.model.frozen.weight.mul_(1.0001)

    fit(TinyModule(perturb), guards(tmp_path), max_steps=45)
    assert said(tmp_path) == [(20, "frozen_weight_moved"), (40, "frozen_weight_moved")]  # not again at 30
    row = RunDir(tmp_path).read_warnings()[0]
    assert row["parameters"] == ["frozen.weight"] and "frozen.weight" in row["seen"]


def test_a_short_training_looks_at_its_end(tmp_path: Path) -> None:
    def perturb(module: TinyModule, index: int) -> None:
        module.model.frozen.bias.data.add_(1.0)

    fit(TinyModule(perturb), guards(tmp_path), max_steps=5)
    assert said(tmp_path) == [(5, "frozen_weight_moved")]


def test_a_trainable_weight_that_never_moves_is_named(tmp_path: Path) -> None:
    def drop(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        module.model.head.bias.grad = None

    fit(TinyModule(), [At(drop), *guards(tmp_path)], max_steps=45)
    assert said(tmp_path) == [(20, "trainable_weight_still")]
    assert "1 of 4" in RunDir(tmp_path).read_warnings()[0]["seen"]


def test_a_learning_rate_that_something_holds_is_told(tmp_path: Path) -> None:
    def hold(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 1e-3

    class Hold(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            hold(trainer, trainer.lightning_module)

    fit(TinyModule(), [Hold(), *guards(tmp_path)], max_steps=19)
    assert said(tmp_path) == [(10, "learning_rate_still")]


def test_a_learning_rate_of_zero_is_told_and_its_effect(tmp_path: Path) -> None:
    fit(TinyModule(lr=0.0), guards(tmp_path, settle=12), max_steps=20)
    assert said(tmp_path) == [(10, "learning_rate_zero"), (20, "trainable_weight_still"), (20, "learning_rate_zero")]


def test_a_gradient_of_zero_and_a_constant_loss_are_told(tmp_path: Path) -> None:
    module = TinyModule(clip_loss=lambda loss, index: loss * 0 + 3.0)
    fit(module, guards(tmp_path), max_steps=12)
    assert said(tmp_path) == [(10, "gradient_zero"), (10, "loss_constant")]


def test_a_loader_slower_than_the_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Batches.__getitem__

    def slow(self: Batches, number: int) -> Any:
        time.sleep(0.05)
        return given(self, number)

    monkeypatch.setattr(Batches, "__getitem__", slow)
    fit(TinyModule(), guards(tmp_path, wait=0.5), max_steps=12)
    assert said(tmp_path) == [(10, "data_starvation")]
    assert "data.num_workers" in RunDir(tmp_path).read_warnings()[0]["look"]


def jump(*indices: int, size: float = 50.0) -> Any:
    return lambda loss, index: loss * size + size if index in indices else loss


def test_a_spike_is_told_with_its_step_size_and_keys(tmp_path: Path) -> None:
    fit(TinyModule(clip_loss=jump(80), max_steps=100), guards(tmp_path), max_steps=100, gradient_clip_val=1.0)
    (row,) = RunDir(tmp_path).read_warnings()
    assert (row["step"], row["cause"], row["rank"]) == (81, "loss_spike", 0)
    assert row["keys"] == ["80-0", "80-1", "80-2", "80-3"]
    assert row["loss"] > 50 > 10 * row["usual"] and row["size"] > 100


def test_a_huge_gradient_that_nothing_clips_is_the_likely_cause(tmp_path: Path) -> None:
    fit(TinyModule(clip_loss=jump(80), max_steps=100), guards(tmp_path), max_steps=90)
    assert "one huge gradient, which nothing clips" in RunDir(tmp_path).read_warnings()[0]["likely"]


def test_a_loss_that_stays_up_is_told_once_more(tmp_path: Path) -> None:
    module = TinyModule(clip_loss=jump(*range(80, 300)), max_steps=200)
    fit(module, guards(tmp_path), max_steps=150, gradient_clip_val=1.0)
    assert said(tmp_path) == [(81, "loss_spike"), (130, "loss_stays_up")]


def test_a_resumed_training_says_what_the_uninterrupted_one_says(tmp_path: Path) -> None:
    def module() -> TinyModule:
        return TinyModule(clip_loss=jump(58, 59, 60, 75), max_steps=100)

    fit(module(), guards(tmp_path / "whole"), max_steps=90)
    cut = tmp_path / "cut"
    trainer = fit(module(), guards(cut), max_steps=59)
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    # what a run that was killed later has said beyond its checkpoint, and a line it did not finish
    with RunDir(cut).warnings_path.open("a") as lines:
        lines.write('{"step": 70, "cause": "later"}\n{"step": 71, "cau')
    fit(module(), guards(cut), max_steps=90, ckpt_path=tmp_path / "state.ckpt")
    assert said(cut) == said(tmp_path / "whole") == [(59, "loss_spike"), (76, "loss_spike")]


def test_a_cause_is_not_said_at_every_step(tmp_path: Path) -> None:
    warnings = WarningLog(RunDir(tmp_path))
    finding = Finding("cause", "seen", "likely", "look")
    assert [step for step in range(1, 100) if warnings.say(step, finding)] == [1, 2, 4, 8, 16, 32, 64]
    assert warnings.say(70, Finding("other", "seen", "likely", "look"))
    again = WarningLog(RunDir(tmp_path))
    again.load_state_dict(warnings.state_dict())
    assert [step for step in range(100, 200) if again.say(step, finding)] == [128]


def test_warnings_of_an_earlier_run_in_the_folder_go(tmp_path: Path) -> None:
    write_text(RunDir(tmp_path).warnings_path, '{"step": 3, "cause": "old"}\n')
    fit(TinyModule(), guards(tmp_path), max_steps=2)
    assert said(tmp_path) == []


def two_rank_spikes(rank: int, folder: str) -> None:
    for name, guilty in (("one", [1]), ("both", [0, 1])):
        spikes = 55 if rank in guilty else -1

        def perturb(module: TinyModule, index: int) -> None:
            if index == 56 and rank == 1:
                module.model.frozen.bias.data.add_(1.0)

        module = TinyModule(perturb, clip_loss=jump(spikes), max_steps=100)
        callbacks = guards(Path(folder) / name)
        fit(module, callbacks, max_steps=60, strategy="ddp", num_nodes=2, gradient_clip_val=1.0)


def test_the_rank_that_brought_the_spike_is_named_with_its_keys(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    on_two_ranks(two_rank_spikes, tmp_path / "ranks", str(tmp_path))
    for name in ("one", "both"):
        # the frozen weight moved on rank 1 alone
        assert said(tmp_path / name) == [(56, "loss_spike"), (60, "frozen_weight_moved")]
        spike = RunDir(tmp_path / name).read_warnings()[0]
        assert ("the batch of rank 1" in spike["likely"]) == (name == "one") and len(spike["keys"]) == 4
        assert spike["rank"] == 1 or name == "both"
