"""Ctrl-C, SIGTERM and SLURM's SIGUSR1 end a run after the current optimizer step, with a checkpoint to resume from.

Never between two micro-batches of one optimizer step, whose gradients no checkpoint holds; and on every rank after the
same step, or the others would wait for ever in a collective.
"""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch

from blip2train import distributed
from blip2train.callback.micro_batch import between_micro_batches

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class InterruptCallback(pl.Callback):
    """Turns a first signal into a clean stop; a second one falls through to the previous handler.

    Args:
        agree_every_steps: optimizer steps between two looks at the other ranks, each of which waits for the device; a
            single process stops after the very step.
    """

    def __init__(self, agree_every_steps: int = 10) -> None:
        self.agree_every_steps = agree_every_steps
        self.signal_name: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        log.warning("%s: stopping after this step and writing a checkpoint; repeat to stop at once", self.signal_name)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if between_micro_batches(trainer):
            return
        if distributed.world_size() > 1:
            if trainer.global_step % self.agree_every_steps:
                return
            signalled = torch.tensor(float(self.signal_name is not None), device=pl_module.device)
            if distributed.reduce_sum(signalled) and not self.signal_name:
                self.signal_name = "signal on another rank"
        if self.signal_name:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()
