"""A wish to stop ends a run after an optimizer step, with a checkpoint: on every rank after the same one.

Never between two micro-batches of one optimizer step, whose gradients no checkpoint holds.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from blip2train.callback.micro_batch import between_micro_batches
from blip2train.callback.stop_signal import StopSignal, Wish
from blip2train.peers import Agreement, LastWord


class InterruptCallback(pl.Callback):
    """Stops training once a rank has heard a signal; several ranks agree on it one step later.

    Args:
        stop: what this process has heard.
    """

    def __init__(self, stop: StopSignal) -> None:
        self.stop = stop
        self.agreed = Wish.NONE
        self.last_word: LastWord | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._agreement, self.last_word = Agreement("stop"), LastWord()
        self.stop.training = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if between_micro_batches(trainer):
            return
        self.agreed = Wish(self._agreement.say(self.stop.wish))
        if self.agreed:
            trainer.should_stop = True


def silence_lightning(trainer: pl.Trainer) -> None:
    """Take Lightning's own signal handling out: it would requeue under SLURM on its own, without our checkpoint.

    It also asks the device once per micro-batch whether rank 0 has heard SIGTERM, and its handler starts a collective
    in the midst of whatever runs. Both have no switch in Lightning 2.6.
    """
    trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]


def _nothing() -> None:
    return None
