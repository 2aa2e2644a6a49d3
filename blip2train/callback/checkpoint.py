"""Writes checkpoints: trainable weights as safetensors, the trainer's state beside them, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from blip2train import distributed
from blip2train.callback.micro_batch import between_micro_batches
from blip2train.checkpoint.find import list_checkpoints
from blip2train.checkpoint.io import TRAINER_STATE, disk_error, save_checkpoint
from blip2train.errors import ConfigError
from blip2train.model.freezing import count_parameters
from blip2train.run_dir import RunDir, free_bytes


class CheckpointCallback(pl.Callback):
    """Saves every `every_steps` optimizer steps, at the end, and when the run is interrupted.

    Args:
        run: the run folder.
        every_steps: optimizer steps between checkpoints; 0 saves only at the end.
        keep_last: older checkpoints are deleted; 0 keeps all.
        trainer_state: also save what resuming needs (optimizer, schedule, data position).
        metadata: facts stored in each file besides the step (stage, name).
    """

    def __init__(
        self,
        run: RunDir,
        *,
        every_steps: int,
        keep_last: int = 2,
        trainer_state: bool = True,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.run, self.every_steps, self.keep_last = run, every_steps, keep_last
        self.trainer_state, self.metadata = trainer_state, dict(metadata or {})
        self._saved_step = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainable, _ = count_parameters(pl_module.model)  # type: ignore[arg-type]
        needed = estimated_bytes(trainable, self.keep_last, self.trainer_state)
        free = free_bytes(self.run.path)
        if needed > free:
            raise ConfigError(
                f"the checkpoints need {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free",
                where=f"run_dir={self.run.path}",
                fix="free some space, or set another run_dir, checkpoint.keep_last=1 or checkpoint.trainer_state=false",
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_steps and step and step % self.every_steps == 0 and step != self._saved_step:
            if between_micro_batches(trainer):
                return  # between two optimizer steps: the gradient so far is not part of any checkpoint
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        final = self.run.checkpoints / f"step-{step:07d}"
        partial = self.run.checkpoints / f".step-{step:07d}.partial"
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        distributed.barrier()
        try:
            if self.trainer_state:
                trainer.save_checkpoint(partial / TRAINER_STATE)
            if distributed.is_main():
                save_checkpoint(pl_module.model, partial, {"step": step, **self.metadata})  # type: ignore[arg-type]
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                self._prune()
        except (OSError, RuntimeError) as error:
            raise disk_error(error, partial) from error
        finally:
            if distributed.is_main():
                shutil.rmtree(partial, ignore_errors=True)
        distributed.barrier()
        self._saved_step = step

    def _prune(self) -> None:
        if self.keep_last:
            for old in list_checkpoints(self.run)[: -self.keep_last]:
                shutil.rmtree(old)


def estimated_bytes(trainable_parameters: int, keep_last: int, trainer_state: bool) -> int:
    """Bytes of a run's checkpoints: float32 weights, with the trainer's state two AdamW moments beside them.

    One more than are kept: a checkpoint is whole before an older one goes.
    """
    return trainable_parameters * 4 * (3 if trainer_state else 1) * (max(keep_last, 1) + 1)
