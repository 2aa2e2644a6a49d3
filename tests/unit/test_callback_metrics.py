"""Log entries against plain arithmetic: means over ranks and batches, whose data wait is the longest, MFU."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from two_ranks import on_two_ranks

from blip2train.callback.compute import SampleFlops, device_peak
from blip2train.callback.metrics import MetricsCallback
from blip2train.callback.step_clock import StepClock


class FakeLogger:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.settings: list[dict[str, Any]] = []
        self.saved = 0

    def log_metrics(self, entry: dict[str, float], step: int) -> None:
        self.rows.append((step, dict(entry)))

    def log_hyperparams(self, settings: dict[str, Any]) -> None:
        self.settings.append(settings)

    def save(self) -> None:
        self.saved += 1


def fake_trainer() -> SimpleNamespace:
    groups = [{"params": [], "lr": 0.2, "name": "decay"}, {"params": [], "lr": 0.1, "name": "no_decay"}]
    return SimpleNamespace(
        global_step=0,
        max_steps=100,
        precision="32-true",
        loggers=[FakeLogger()],
        optimizers=[SimpleNamespace(param_groups=groups)],
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def run(
    metrics: MetricsCallback, clock: StepClock, steps: list[dict[str, Any]], trainer: SimpleNamespace | None = None
) -> list[tuple[int, dict[str, float]]]:
    """Feed steps as a trainer does: `wait` seconds before the batch, `after` seconds in a later callback."""
    trainer = trainer or fake_trainer()
    module: Any = None
    metrics.on_train_start(trainer, module)
    clock.on_train_start(trainer, module)
    for index, step in enumerate(steps):
        time.sleep(step.get("wait", 0.0))
        batch = SimpleNamespace(num_tokens=torch.tensor(step.get("tokens", 0)))
        for callback in (metrics, clock):
            callback.on_train_batch_start(trainer, module, batch, index)
        time.sleep(step.get("work", 0.0))
        trainer.global_step += step.get("optimizer_steps", 1)
        outputs = {"metrics": {"train/loss": torch.tensor(step["loss"])}, "samples": step.get("samples", 1)}
        metrics.on_train_batch_end(trainer, module, outputs, batch, index)
        time.sleep(step.get("after", 0.0))
        clock.on_train_batch_end(trainer, module, outputs, batch, index)
    metrics.on_train_end(trainer, module)
    rows: list[tuple[int, dict[str, float]]] = trainer.loggers[0].rows
    return rows


def test_an_entry_averages_every_batch_since_the_last_one_micro_batches_too() -> None:
    clock = StepClock()
    steps = [{"loss": float(value), "optimizer_steps": value % 2} for value in range(8)]
    rows = run(MetricsCallback(2, clock), clock, steps)
    assert [(step, entry["train/loss"]) for step, entry in rows] == [(2, 1.5), (4, 5.5)]


def test_rates_are_those_of_the_window_and_the_last_window_may_be_shorter() -> None:
    clock = StepClock()
    steps = [{"loss": 1.0, "samples": 6, "tokens": 30, "work": 0.02} for _ in range(3)]
    (_, first), (_, last) = run(MetricsCallback(2, clock), clock, steps)
    for entry in (first, last):
        assert 0.02 <= entry["step_seconds"] < 0.2
        assert entry["samples_per_second"] == pytest.approx(6 / entry["step_seconds"])
        assert entry["tokens_per_second"] == pytest.approx(30 / entry["step_seconds"])


def test_a_checkpoint_being_written_is_no_waiting_for_data() -> None:
    clock = StepClock()
    (_, slow), (_, quick) = run(MetricsCallback(1, clock), clock, [{"loss": 1.0, "wait": 0.2}, {"loss": 1.0}])
    assert slow["data_wait_fraction"] > 0.8 > 0.5 > quick["data_wait_fraction"]
    clock = StepClock()
    (_, entry) = run(MetricsCallback(2, clock), clock, [{"loss": 1.0, "after": 0.2}, {"loss": 1.0, "work": 0.05}])[0]
    assert entry["data_wait_fraction"] < 0.2 and entry["step_seconds"] > 0.12


def test_rates_of_every_parameter_group_chance_levels_and_settings_are_logged() -> None:
    clock, trainer = StepClock(), fake_trainer()
    callback = MetricsCallback(1, clock, chance=lambda: {"train/loss": 2.5}, settings={"seed": 1})
    ((_, entry),) = run(callback, clock, [{"loss": 1.0}], trainer)
    assert (entry["learning_rate"], entry["learning_rate/decay"], entry["learning_rate/no_decay"]) == (0.2, 0.2, 0.1)
    assert entry["chance/loss"] == 2.5 and callback.latest == entry
    assert trainer.loggers[0].settings == [{"seed": 1}] and trainer.loggers[0].saved == 1


def test_a_logger_on_a_full_disk_is_named_once_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    class FullLogger(FakeLogger):
        def save(self) -> None:
            raise OSError(28, "No space left on device")

    clock, trainer = StepClock(), fake_trainer()
    trainer.loggers.insert(0, FullLogger())
    run(MetricsCallback(1, clock), clock, [{"loss": 1.0}] * 3, trainer)
    assert [step for step, _ in trainer.loggers[1].rows] == [1, 2, 3]
    (line,) = caplog.messages
    assert "FullLogger misses entries from step 1 on" in line and "No space left" in line


def test_mfu_is_the_work_of_samples_and_tokens_over_time_and_peak() -> None:
    clock = StepClock()
    callback = MetricsCallback(1, clock, flops=SampleFlops(3e9, 1e8), peak_tflops=2.0)
    ((_, entry),) = run(callback, clock, [{"loss": 1.0, "samples": 4, "tokens": 50, "work": 0.02}])
    tera = (4 * 3e9 + 50 * 1e8) / 1e12
    assert entry["tflops_per_second"] == pytest.approx(tera / entry["step_seconds"])
    assert entry["mfu"] == pytest.approx(entry["tflops_per_second"] / 2.0)
    clock = StepClock()
    ((_, plain),) = run(MetricsCallback(1, clock, peak_tflops=2.0), clock, [{"loss": 1.0}])
    assert not {"mfu", "tflops_per_second"} & plain.keys()


def _uneven_ranks(rank: int) -> list[tuple[int, dict[str, float]]]:
    # losses are scaled so that their mean over ranks is that of the whole batch, whatever each brought
    steps = [
        {"loss": [1.0, 3.0][rank], "samples": [2, 5][rank], "tokens": [10, 40][rank], "wait": [0.0, 0.1][rank]},
        {"loss": [2.0, float("nan")][rank], "samples": [4, 1][rank], "tokens": [20, 0][rank]},
    ]
    clock = StepClock()
    return run(MetricsCallback(1, clock, flops=SampleFlops(1e9, 1e8)), clock, steps)


def test_ranks_with_uneven_batches_give_one_entry(tmp_path: Path) -> None:
    mine, theirs = on_two_ranks(_uneven_ranks, tmp_path)
    (_, first), (_, second) = mine
    assert (first["train/loss"], second["train/loss"]) == (2.0, 2.0)  # what is not finite stays out
    assert first["samples_per_second"] * first["step_seconds"] == pytest.approx(7)
    assert first["tokens_per_second"] * first["step_seconds"] == pytest.approx(50)
    assert first["tflops_per_second"] * first["step_seconds"] == pytest.approx((7 * 1e9 + 50 * 1e8) / 2e12)
    assert first["data_wait_rank"] == 1.0 and first["data_wait_fraction"] > 0.5
    same = {"train/loss", "data_wait_rank", "data_wait_fraction", "memory_gb"}
    assert all({k: a[k] for k in same} == {k: b[k] for k in same} for (_, a), (_, b) in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H200", "bf16-mixed", 989.4),
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4),
        ("NVIDIA H100 PCIe", "16-mixed", 756.0),
        ("NVIDIA A100-SXM4-40GB", "bf16-true", 312.0),
        ("NVIDIA L40S", "bf16-mixed", 362.0),
        ("NVIDIA A100-SXM4-40GB", "32-true", None),
        ("NVIDIA GeForce RTX 9999", "bf16-mixed", None),
        ("NVIDIA GH200 480GB", "bf16-mixed", 989.4),
        ("NVIDIA A10G", "bf16-mixed", None),
        ("NVIDIA RTX A4000", "bf16-mixed", None),
    ],
)
def test_devices_have_the_peak_of_their_data_sheet(name: str, precision: str, tflops: float | None) -> None:
    assert device_peak(name, precision) == tflops


def test_tf32_counts_where_it_is_allowed() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert device_peak("NVIDIA A100-SXM4-40GB", "32-true") == 156.0
    finally:
        torch.set_float32_matmul_precision(before)
