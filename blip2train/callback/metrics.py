"""Step outputs -> one log entry per window: losses averaged over it, throughput, data wait, learning rates.

Averages are over every batch since the last entry and over all ranks: a curve does not depend on which micro-batch, or
which rank, happened to be looked at. Values that are not finite stay out of them: `callback/finite.py` skips and
reports such a step. Between two entries nothing here waits for the device. LAVIS prints the last step of one rank.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor

from blip2train import distributed
from blip2train.callback.compute import SampleFlops, device_peak
from blip2train.callback.gradient import total_norm
from blip2train.callback.step_clock import StepClock

log = logging.getLogger(__name__)


class MetricsCallback(pl.Callback):
    """Logs, besides every metric of the steps (`train/*`) and what `more` gives:

    `chance/*`              what the loss of that name is for a model that knows nothing
    `samples_per_second`, `tokens_per_second`    of all ranks; tokens of text, padding not counted
    `step_seconds`          wall time of an optimizer step, checkpoints and logging included
    `data_wait_fraction`    share of the time in which the rank `data_wait_rank`, the worst, waited for its next batch
    `learning_rate`, `learning_rate/GROUP`       the highest, and that of each parameter group
    `gradient_norm`         of the last step, before clipping
    `memory_gb`             the highest of any rank so far
    `tflops_per_second`, `mfu`                   of the model's operations, per device; as a share of its peak

    Args:
        every_steps: optimizer steps per log entry.
        clock: a callback of the same trainer.
        more: further numbers for every entry, asked for on every rank.
        watch: told the step and the finished entry, on every rank.
        chance: names of metrics -> their chance levels; asked when training starts.
        flops: of a sample; None leaves out what needs it.
        peak_tflops: of one device; None looks for its name in a table.
        settings: of the run, for loggers that show them.
    """

    def __init__(
        self,
        every_steps: int,
        clock: StepClock,
        *,
        more: Callable[[], Mapping[str, float]] = dict,
        watch: Callable[[int, Mapping[str, float]], None] | None = None,
        chance: Callable[[], Mapping[str, float]] = dict,
        flops: SampleFlops | None = None,
        peak_tflops: float | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.every_steps, self._clock = every_steps, clock
        self._more, self._watch, self._chance = more, watch, chance
        self._flops, self._peak, self._settings = flops, peak_tflops, settings
        self._logged_step = -1
        self.latest: Mapping[str, float] = {}
        self._failed: set[str] = set()
        self._reset(0)

    def _reset(self, step: int) -> None:
        self._sums: dict[str, Tensor] = {}
        self._finite: dict[str, Tensor] = {}
        self._tokens: Tensor | None = None
        self._batches = self._samples = 0
        self._gradient_norm: Tensor | None = None
        self._window_step, self._window_start = step, time.perf_counter()
        self._clock.take_wait()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = trainer.strategy.root_device
        if self._peak is None and device.type == "cuda":
            self._peak = device_peak(torch.cuda.get_device_name(device), str(trainer.precision))
        self._levels = {f"chance/{name.removeprefix('train/')}": level for name, level in self._chance().items()}
        if self._settings is not None:
            for logger in trainer.loggers:
                logger.log_hyperparams(dict(self._settings))
        self._logged_step = trainer.global_step  # a resumed run has logged this step before
        self._reset(trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step = trainer.global_step + 1
        if step % self.every_steps == 0 or step == trainer.max_steps:  # before clipping, and only where it is logged
            self._gradient_norm = total_norm(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, value in outputs["metrics"].items():
            finite = torch.isfinite(value)
            self._sums[name] = self._sums.get(name, 0.0) + torch.where(finite, value, 0.0).float()
            self._finite[name] = self._finite.get(name, 0.0) + finite.float()
        self._batches += 1
        self._samples += outputs["samples"]
        self._tokens = batch.num_tokens if self._tokens is None else self._tokens + batch.num_tokens
        step = trainer.global_step
        if step % self.every_steps == 0 and step != self._logged_step:
            self._log(trainer, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._batches:  # the last window is shorter when the run does not end on a multiple of `every_steps`
            self._log(trainer, trainer.global_step)

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        entry = self._reduced(trainer, step) | self._levels
        groups = trainer.optimizers[0].param_groups
        entry["learning_rate"] = max(group["lr"] for group in groups)
        entry |= {f"learning_rate/{group['name']}": group["lr"] for group in groups if "name" in group}
        if self._gradient_norm is not None and torch.isfinite(self._gradient_norm):
            entry["gradient_norm"] = float(self._gradient_norm)
        entry |= self._more()
        for logger in trainer.loggers:
            self._tell(logger, entry, step)
        if self._watch is not None:
            self._watch(step, entry)
        self.latest, self._logged_step = entry, step
        self._reset(step)

    def _tell(self, logger: Logger, entry: dict[str, float], step: int) -> None:
        try:
            logger.log_metrics(entry, step=step)
            logger.save()  # what is buffered would be lost with the process
        except OSError as error:  # a full disk; what is logged is not worth the run
            name = type(logger).__name__
            if name not in self._failed:
                log.warning("%s misses entries from step %d on (%s)", name, step, error)
            self._failed.add(name)

    def _reduced(self, trainer: pl.Trainer, step: int) -> dict[str, float]:
        """What has to be brought together from all ranks, in one collective, which also waits for the device."""
        device = trainer.strategy.root_device
        names = sorted(self._sums)
        waited = self._clock.take_wait() / (time.perf_counter() - self._window_start)
        tokens = torch.zeros(()) if self._tokens is None else self._tokens
        own = torch.tensor([self._samples, waited, peak_memory_gb(device)], device=device)
        tables = [table[name].reshape(1).to(device) for table in (self._sums, self._finite) for name in names]
        rows = distributed.gather(torch.cat([own, tokens.float().reshape(1).to(device), *tables])[None]).tolist()
        seconds = time.perf_counter() - self._window_start
        samples, waits, memory, token_counts, *columns = (list(column) for column in zip(*rows, strict=True))
        totals = [sum(column) for column in columns]
        pairs = zip(names, totals[: len(names)], totals[len(names) :], strict=True)
        entry = {name: total / count for name, total, count in pairs if count}
        entry["samples_per_second"] = sum(samples) / seconds
        entry["tokens_per_second"] = sum(token_counts) / seconds
        entry["step_seconds"] = seconds / max(step - self._window_step, 1)
        entry["data_wait_fraction"] = max(waits)
        if len(rows) > 1:
            entry["data_wait_rank"] = float(waits.index(max(waits)))
        entry["memory_gb"] = max(memory)
        if self._flops is not None:
            rate = self._flops.of(sum(samples), sum(token_counts)) / seconds / len(rows) / 1e12
            entry["tflops_per_second"] = rate
            if self._peak is not None:
                entry["mfu"] = rate / self._peak
        return entry


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
