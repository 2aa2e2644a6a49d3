"""Loss and gradient of every optimizer step -> the step, or none: what is not finite never reaches the weights.

The step is left out on all ranks alike, the data and the schedule move on, and so few such steps are allowed. One small
all-reduce and one read of three numbers per step: the host waits for the backward pass there, as it does for gradient
scaling. LAVIS stops at nothing: a NaN goes into the weights and into every later checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from torch import Tensor

from blip2train import distributed
from blip2train.callback.bad_step import BadStepRecorder, Step
from blip2train.callback.gradient import total_norm
from blip2train.callback.micro_batch import between_micro_batches
from blip2train.callback.warning_log import WarningLog
from blip2train.errors import Blip2TrainError
from blip2train.health.finding import Finding
from blip2train.health.probe import is_finite

BUDGET_STEPS = 1000
"""The budget of skipped steps holds for any so many steps in a row."""

_LEAST_SCALE = 1.0
"""Under 16-mixed an infinite gradient is the loss scale's fault; at a scale below this it no longer is."""


_FIX = (
    "look at the report and at the batch (`blip2train show batch batch=FILE`); lower optim.lr, lengthen "
    "optim.warmup_steps or take trainer.precision=bf16-mixed instead of 16-mixed; then continue from the last "
    "checkpoint, which is from before this (resume=auto), or train on with health.max_skipped_steps raised"
)


class NonFiniteError(Blip2TrainError):
    """Losses or gradients are NaN or infinite, and leaving out steps does not help; the weights are still good."""


@dataclass(frozen=True, slots=True)
class _Judged:
    """One step over all ranks: loss (mean over ranks), gradient norm (NaN where unknown), was any loss bad."""

    loss: float
    norm: float
    bad_loss: bool


class FiniteCallback(pl.Callback):
    """Drops the gradients of a step whose loss or gradient is not finite, and stops the run when there are too many.

    Args:
        recorder: writes such a step down.
        warnings: where it is said.
        max_skipped_steps: steps that may be left out among any `BUDGET_STEPS`; one more raises `NonFiniteError`.
        on_step: told number, loss, gradient norm and micro-batches of every step that is taken, on every rank.
    """

    def __init__(
        self,
        recorder: BadStepRecorder,
        warnings: WarningLog,
        max_skipped_steps: int,
        on_step: Callable[[pl.Trainer, Step], None] | None = None,
    ) -> None:
        self._recorder, self._warnings = recorder, warnings
        self._max_skipped, self._on_step = max_skipped_steps, on_step
        self._skipped: list[int] = []
        self._num_skipped = self._scaler_skips = 0
        self._batches: list[tuple[int, Any]] = []
        self._losses: list[Tensor] = []
        self._judged_steps = self._clipped_steps = 0
        self._over = True

    def progress(self) -> dict[str, float]:
        """For a log entry: steps skipped since the run's start, and the share of those since the last call clipped."""
        entry = {"skipped_steps": float(self._num_skipped)}
        if self._judged_steps:
            entry["gradient_clipped"] = self._clipped_steps / self._judged_steps
        self._judged_steps = self._clipped_steps = 0
        return entry

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._over:
            self._batches, self._losses, self._over = [], [], False
        self._batches.append((trainer.fit_loop.total_batch_idx, batch))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach().float())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if between_micro_batches(trainer):  # DeepSpeed counts them itself and is called after each
            return
        self._over = True
        judged = self._judge(trainer, optimizer)
        step = Step(trainer.global_step + 1, judged.loss, judged.norm, self._batches, self._losses)
        bad_gradient = not math.isfinite(judged.norm)
        if not judged.bad_loss and not bad_gradient:
            self._scaler_skips = 0
            self._judged_steps += 1
            self._clipped_steps += judged.norm > (trainer.gradient_clip_val or math.inf)
            if self._on_step is not None:
                self._on_step(trainer, step)
        elif not judged.bad_loss and _loss_scale(trainer) > _LEAST_SCALE:
            self._note_scaler(step.number)
        else:
            self._skip(trainer, pl_module, optimizer, step, judged)

    def _judge(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> _Judged:
        norm = total_norm(trainer, optimizer)
        losses = torch.stack(self._losses)
        finite = torch.isfinite(losses)
        local = torch.stack([torch.where(finite, losses, 0.0).sum(), (~finite).sum().float()])
        shown = distributed.reduce_sum(local)
        if norm is not None:
            shown = torch.cat([shown, norm.detach().to(shown).reshape(1)])
        loss, bad, *said = shown.tolist()  # the one place where the host waits for the device
        loss = loss / distributed.world_size() / _loss_scale(trainer)
        return _Judged(math.nan if bad else loss, said[0] if said else 0.0, bad > 0)

    def _note_scaler(self, step: int) -> None:
        """Gradient scaling looks for its scale by such steps and leaves them out itself."""
        self._scaler_skips += 1
        if self._scaler_skips % 10 == 0:
            seen = f"{self._scaler_skips} steps in a row overflowed in float16 and were left out by the loss scaling"
            likely = "activations or gradients are beyond float16's range, whatever the scale"
            finding = Finding("loss_scaling", seen, likely, "trainer.precision=bf16-mixed, which needs no scaling")
            self._warnings.say_always(step, finding)

    def _skip(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        step: Step,
        judged: _Judged,
    ) -> None:
        self._num_skipped += 1
        self._skipped = [number for number in self._skipped if number > step.number - BUDGET_STEPS] + [step.number]
        broken = _broken_weights(pl_module)
        last = bool(broken) or len(self._skipped) > self._max_skipped
        what = "a loss" if judged.bad_loss else "the gradient"
        report = f"{what} is not finite{self._recorder.record(trainer, pl_module, step, last=last)}"
        hides = hasattr(trainer.strategy, "gradient_norm")  # such a strategy leaves out what is not finite by itself
        if broken:
            self._stop(f"weights are not finite ({', '.join(broken[:3])}); no later step could be", step, report)
        if last:
            counted = f"{len(self._skipped)} of the last {BUDGET_STEPS} steps were not finite"
            self._stop(f"{counted}, health.max_skipped_steps={self._max_skipped} are allowed", step, report)
        if hides and math.isfinite(judged.norm):
            self._stop("the loss is not finite, yet its gradient is, which this strategy cannot drop", step, report)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self._warnings.say_always(step.number, _left_out(report, judged.bad_loss))

    def _stop(self, found: str, step: Step, report: str) -> NoReturn:
        self._warnings.say_always(step.number, Finding("stopped", f"the run ends: {found}", report, _FIX))
        raise NonFiniteError(found, where=f"training, step {step.number}: {report}", fix=_FIX)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": list(self._skipped), "num_skipped": self._num_skipped, "scaler_skips": self._scaler_skips}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped, self._num_skipped = list(state_dict["skipped"]), state_dict["num_skipped"]
        self._scaler_skips = state_dict["scaler_skips"]


def _loss_scale(trainer: pl.Trainer) -> float:
    """Factor of gradient scaling; 1 where there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _broken_weights(pl_module: pl.LightningModule) -> list[str]:
    """Names, over all ranks, of parameters that are themselves not finite."""
    named = pl_module.model.named_parameters()  # type: ignore[union-attr]
    broken = [name for name, parameter in named if not is_finite(parameter)]
    return sorted(set(distributed.gather_objects(broken)))


def _left_out(report: str, bad_loss: bool) -> Finding:
    likely = (
        "a record of the batch that no layer should see, or a value beyond the range of the number format"
        if bad_loss
        else "an overflow or a division by zero in the backward pass, where the forward pass is fine"
    )
    return Finding("step_left_out", f"left out, {report}", likely, "the report; `blip2train show batch batch=FILE`")
