"""Writes checkpoints: trainable weights as safetensors, the trainer's state beside them, whole or not at all.

A disk that is full costs a checkpoint and not the run: the one before stays, and the next steps try again. LAVIS writes
in place, and keeps the last epoch's file alone.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from torch import Tensor

from blip2train import distributed
from blip2train.callback.micro_batch import between_micro_batches
from blip2train.callback.trainer_state import TrainerStateFile
from blip2train.checkpoint.find import METRIC, list_checkpoints, rank_by_metric
from blip2train.checkpoint.io import TRAINER_STATE, disk_error, save_weights
from blip2train.checkpoint.publish import clear_leftovers, delete, partial_of, publish
from blip2train.errors import Blip2TrainError, CheckpointError, ConfigError
from blip2train.model.freezing import count_parameters
from blip2train.peers import Agreement
from blip2train.run_dir import RunDir, free_bytes
from blip2train.strategy.whole import whole_state_dict

log = logging.getLogger(__name__)

FIRST_WAIT_SECONDS = 5.0
_TAIL_BYTES = 1 << 20


class CheckpointCallback(pl.Callback):
    """Saves by optimizer steps, by minutes, at the end, and when the run is interrupted.

    Args:
        run: the run folder.
        every_steps: optimizer steps between checkpoints; 0: none by steps.
        every_minutes: rank 0's minutes between checkpoints; None: none by the clock.
        keep_last: older checkpoints are deleted; 0 keeps all.
        best_metric: a key of metrics.jsonl: the checkpoint with the best value, as last logged, is kept as well.
        best_mode: whether the lowest or the highest value is the best.
        trainer_state: also save what resuming needs (optimizer, schedule, data position).
        retry_steps: optimizer steps after which a checkpoint that could not be written is tried again.
        final_wait_minutes: how long the end of training waits for a disk that cannot take the last checkpoint.
        metadata: facts stored in each checkpoint besides the step (stage, name).
        resumed: the checkpoint that this run goes on from.
        settle: called on the main rank once every rank has read that one, before the first step.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        every_steps: int,
        every_minutes: float | None = None,
        keep_last: int = 2,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        trainer_state: bool = True,
        retry_steps: int = 100,
        final_wait_minutes: float = 2.0,
        metadata: Mapping[str, Any] | None = None,
        resumed: Path | None = None,
        settle: Callable[[], None] | None = None,
    ) -> None:
        self.run, self.every_steps, self.every_minutes, self.keep_last = run, every_steps, every_minutes, keep_last
        self.best_metric, self.best_mode = best_metric, best_mode
        self.trainer_state, self.metadata = trainer_state, dict(metadata or {})
        self.retry_steps, self.final_wait_minutes = retry_steps, final_wait_minutes
        self._resumed, self._settle = resumed, settle
        check_settings(self)
        self._file = TrainerStateFile()
        self._tried_step = self._saved_step = -1
        self._retry_at: int | None = None
        self._last_time, self._said_late = time.monotonic(), False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = self._file
        names = distributed.gather_objects([self._resumed.name if self._resumed else "no checkpoint"])
        if len(set(names)) > 1:
            other = next(rank for rank, name in enumerate(names) if name != names[0])
            raise CheckpointError(
                f"ranks start from different checkpoints: rank 0 from {names[0]}, rank {other} from {names[other]}",
                where=str(self.run.checkpoints),
                fix="put run_dir= where every rank sees the same files",
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainable, _ = count_parameters(pl_module.model)  # type: ignore[arg-type]
        kept = self.keep_last + (self.best_metric is not None)
        needed = estimated_bytes(trainable, kept, self.trainer_state)
        needed -= sum(path.stat().st_size for path in self.run.checkpoints.glob("step-*/*"))
        needed, free = distributed.gather_objects([(needed, free_bytes(self.run.path))])[0]  # the main rank writes
        if needed > free:
            raise ConfigError(
                f"the checkpoints need {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free",
                where=f"run_dir={self.run.path}",
                fix="free some space, or set another run_dir, checkpoint.keep_last=1 or checkpoint.trainer_state=false",
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        distributed.barrier()  # every rank has read what it goes on from
        error = self._settle_on_main()
        error = distributed.gather_objects([error])[0]
        if error is not None:
            raise error
        if self._resumed is not None:
            self._saved_step = trainer.global_step
        self._clock = Agreement("checkpoint")
        self._last_time = time.monotonic()

    def _settle_on_main(self) -> Blip2TrainError | None:
        if not distributed.is_main():
            return None
        clear_leftovers(self.run.checkpoints)
        try:
            if self._settle is not None:
                self._settle()
        except Blip2TrainError as error:
            return error
        return None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not step or step in (self._saved_step, self._tried_step) or between_micro_batches(trainer):
            return  # between two micro-batches the gradient so far is not part of any checkpoint
        if not self._is_due(step):
            return
        error = self._save(trainer)
        self._last_time, self._said_late, self._retry_at = time.monotonic(), False, None
        if error is not None:
            self._retry_at = step + self.retry_steps
            in_turn = step - step % self.every_steps + self.every_steps if self.every_steps else self._retry_at
            self._say("%s\n  training goes on; step %d tries again", error, min(self._retry_at, in_turn))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self._saved_step:
            return
        error = self._save(trainer)
        for seconds in waits(self.final_wait_minutes * 60):
            if error is None:
                return
            self._say("%s\n  this was the last step; trying again in %.0f s", error, seconds)
            time.sleep(seconds)
            error = self._save(trainer)
        if error is not None:
            raise error

    def _is_due(self, step: int) -> bool:
        by_clock = self.every_minutes is not None and self._clock_says_so(self.every_minutes)
        by_steps = self.every_steps > 0 and step % self.every_steps == 0
        return by_clock or by_steps or (self._retry_at is not None and step >= self._retry_at)

    def _clock_says_so(self, minutes: float) -> bool:
        late = distributed.is_main() and time.monotonic() - self._last_time >= minutes * 60
        says_it_now = late and not self._said_late  # once: the other ranks hear of it a step later
        self._said_late = late
        return bool(self._clock.say(int(says_it_now)))

    def _save(self, trainer: pl.Trainer) -> Blip2TrainError | None:
        """Write a checkpoint of this step, on all ranks; what the main one could not write, all of them know."""
        step = self._tried_step = trainer.global_step
        final = self.run.checkpoints / f"step-{step:07d}"
        if distributed.is_main():
            shutil.rmtree(partial_of(final), ignore_errors=True)
        if self.trainer_state:
            trainer.save_checkpoint(partial_of(final) / TRAINER_STATE, weights_only=False)
        weights = whole_state_dict(trainer)
        samples = getattr(getattr(trainer, "datamodule", None), "num_samples_consumed", None)
        facts = {"step": step, "samples": samples, **self.metadata}
        own = self._write(final, weights, facts) if distributed.is_main() else None
        error: Blip2TrainError | None = distributed.gather_objects([own])[0]
        if error is None:
            self._saved_step = step
        return error

    def _write(self, final: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Blip2TrainError | None:
        metric = self._metric()
        try:
            failed = self._file.take_error()
            if failed is not None:
                raise failed
            save_weights(weights, partial_of(final), {**facts, METRIC: metric} if metric else facts)
            publish(final)
        except CheckpointError as error:
            return error
        except OSError as error:
            return disk_error(error, final.parent)
        finally:
            shutil.rmtree(partial_of(final), ignore_errors=True)
        self._prune()
        return None

    def _say(self, message: str, *facts: object) -> None:
        if distributed.is_main():
            log.error(message, *facts)

    def _metric(self) -> dict[str, Any] | None:
        if self.best_metric is None:
            return None
        known = last_values(self.run.metrics_path)
        if self.best_metric not in known:
            close = difflib.get_close_matches(self.best_metric, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(known) or 'no row'}"
            log.warning("checkpoint.best_metric: metrics.jsonl has no %r yet%s", self.best_metric, hint)
            return None
        return {"name": self.best_metric, "mode": self.best_mode, "value": known[self.best_metric]}

    def _prune(self) -> None:
        known = list_checkpoints(self.run)
        best = rank_by_metric(known, self.best_metric)[:1] if self.best_metric is not None else []
        for old in known[: -self.keep_last] if self.keep_last else []:
            if old in best:
                continue
            try:
                delete(old)
            except OSError as error:  # the new one stands: no reason to stop
                log.warning("%s could not be deleted (%s)", old, error)


def check_settings(callback: CheckpointCallback) -> None:
    """ConfigError for a setting that cannot be meant."""
    numbers = ("every_steps", "every_minutes", "keep_last", "retry_steps", "final_wait_minutes")
    wrong = [name for name in numbers if (getattr(callback, name) or 0) < 0]
    wrong += ["retry_steps"] * (callback.retry_steps == 0) + ["every_minutes"] * (callback.every_minutes == 0)
    if callback.best_mode not in ("min", "max"):
        raise ConfigError(
            f"best_mode is {callback.best_mode!r}", where="checkpoint.best_mode", fix='use "min" or "max"'
        )
    if wrong:
        raise ConfigError(
            f"{wrong[0]} is {getattr(callback, wrong[0])}",
            where=f"checkpoint.{wrong[0]}",
            fix="every_steps=0 and every_minutes=null turn these off; retry_steps is 1 or more",
        )


def waits(total_seconds: float) -> Iterator[float]:
    """Seconds between attempts, each twice the one before, until `total_seconds` have been waited."""
    waited, seconds = 0.0, FIRST_WAIT_SECONDS
    while waited < total_seconds:
        seconds = min(seconds, total_seconds - waited)
        yield seconds
        waited, seconds = waited + seconds, seconds * 2


def last_values(metrics: Path) -> dict[str, float]:
    """The value that each name of a metrics.jsonl was last logged with; reads the end of a long one alone."""
    if not metrics.is_file():
        return {}
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - _TAIL_BYTES))
        lines = file.read().splitlines()
    values: dict[str, float] = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # the first may be cut by the seek, the last by a kill
            values |= json.loads(line)
    return values


def estimated_bytes(trainable_parameters: int, kept: int, trainer_state: bool) -> int:
    """Bytes of a run's checkpoints: float32 weights, with the trainer's state two AdamW moments beside them.

    One more than are kept: a checkpoint is whole before an older one goes.
    """
    return trainable_parameters * 4 * (3 if trainer_state else 1) * (max(kept, 1) + 1)
