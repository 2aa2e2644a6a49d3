"""Batches -> the seconds in which training waited for the next one."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl


class StepClock(pl.Callback):
    """To be the last callback: what others do after a batch, such as writing a checkpoint, is no waiting for data."""

    def __init__(self) -> None:
        self._waited, self._batch_end = 0.0, time.perf_counter()

    def take_wait(self) -> float:
        """Seconds waited since this was asked before."""
        waited, self._waited = self._waited, 0.0
        return waited

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._waited, self._batch_end = 0.0, time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._batch_end

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch_end = time.perf_counter()
