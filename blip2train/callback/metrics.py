"""Step outputs -> one log entry per window: losses averaged over it, throughput, data wait, learning rates.

Averages are over every batch since the last entry: a curve does not depend on which micro-batch happened to be last.
Values that are not finite stay out of them: `callback/finite.py` skips and reports such a step.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from blip2train import distributed
from blip2train.callback.gradient import total_norm


class MetricsCallback(pl.Callback):
    """Logs `train/*`, `samples_per_second`, `data_wait_fraction`, `learning_rate`, `gradient_norm`, `memory_gb`.

    Args:
        every_steps: optimizer steps per log entry.
        more: further numbers for every entry, asked for on every rank.
        watch: told the step and the finished entry, on every rank.
    """

    def __init__(
        self,
        every_steps: int = 10,
        more: Callable[[], Mapping[str, float]] | None = None,
        watch: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.every_steps, self._more, self._watch = every_steps, more, watch
        self._logged_step = -1
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._finite: dict[str, Tensor] = {}
        self._batches = self._samples = 0
        self._wait_seconds = 0.0
        self._gradient_norm: Tensor | None = None
        self._window_start = self._batch_end = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._logged_step = trainer.global_step  # a resumed run has logged this step before
        self._reset()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._wait_seconds += time.perf_counter() - self._batch_end

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if (trainer.global_step + 1) % self.every_steps == 0:  # before clipping, and only where it is logged
            self._gradient_norm = total_norm(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch_end = time.perf_counter()
        for name, value in outputs["metrics"].items():
            finite = torch.isfinite(value)
            self._sums[name] = self._sums.get(name, 0.0) + torch.where(finite, value, 0.0).float()
            self._finite[name] = self._finite.get(name, 0.0) + finite.float()
        self._batches += 1
        self._samples += outputs["samples"]
        step = trainer.global_step
        if step % self.every_steps == 0 and step != self._logged_step:
            self._log(trainer, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._batches:  # the last window is shorter when the run does not end on a multiple of `every_steps`
            self._log(trainer, trainer.global_step)

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        seconds = time.perf_counter() - self._window_start
        names = sorted(self._sums)
        totals = torch.stack([torch.stack([table[name] for name in names]) for table in (self._sums, self._finite)])
        sums, counts = distributed.reduce_sum(totals).tolist()
        entry = {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}
        entry["samples_per_second"] = self._samples * distributed.world_size() / seconds
        entry["data_wait_fraction"] = self._wait_seconds / seconds
        entry["learning_rate"] = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        if self._gradient_norm is not None and torch.isfinite(self._gradient_norm):
            entry["gradient_norm"] = float(self._gradient_norm)
        entry["memory_gb"] = peak_memory_gb(trainer.strategy.root_device)
        if self._more is not None:
            entry |= self._more()
        for logger in trainer.loggers:
            logger.log_metrics(entry, step=step)
        if self._watch is not None:
            self._watch(step, entry)
        self._logged_step = step
        self._reset()


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
