"""Progress of a training run: step of total, rate, ETA, losses and their chance levels; a bar, or lines in a log file.

Shows what was logged last: looking into the current step would make it wait for the device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from blip2train import distributed
from blip2train.callback.clock import format_seconds

log = logging.getLogger(__name__)


class ProgressCallback(pl.Callback):
    """Shows how far a run is.

    Args:
        title: what is running.
        latest: the last log entry, empty before the first.
        every_seconds: between two lines where the output is not a terminal.
    """

    def __init__(self, title: str, latest: Callable[[], Mapping[str, float]], every_seconds: float = 15.0) -> None:
        self.title, self.every_seconds, self._latest = title, every_seconds, latest
        self._bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._last_line = time.monotonic()
        self._first_step = trainer.global_step
        console = Console(stderr=True)
        if distributed.is_main() and console.is_terminal:
            columns: tuple[ProgressColumn, ...]
            columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
            status = TextColumn(
                "{task.fields[status]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            )
            columns += (TextColumn("ETA"), TimeRemainingColumn(), status)
            self._bar = Progress(*columns, console=console, expand=True)  # only the status gives way
            self._task = self._bar.add_task(self.title, total=trainer.max_steps, completed=self._first_step, status="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = time.monotonic(), trainer.global_step
        due = now - self._last_line >= (0.5 if self._bar else self.every_seconds)
        if not distributed.is_main() or not (due or step == trainer.max_steps):
            return
        self._last_line = now
        status = describe_entry(self._latest(), brief=self._bar is not None)
        if self._bar:
            self._bar.update(self._task, completed=step, status=status)
        else:
            # of this start only: a resumed run knows nothing about how long its first steps took
            eta = (trainer.max_steps - step) * (now - self._started) / max(step - self._first_step, 1)
            log.info("%s %d/%d  %s  ETA %s", self.title, step, trainer.max_steps, status, format_seconds(eta))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar:
            self._bar.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._bar:
            self._bar.stop()


def describe_entry(entry: Mapping[str, float], *, brief: bool = False) -> str:
    """`810 samples/s  loss 3.910  itc 1.204 (chance 2.079)`, brief `810 samples/s  loss 3.91  itc 1.20/2.08`.

    Empty before the first entry.
    """
    parts = [f"{entry['samples_per_second']:.0f} samples/s"] if "samples_per_second" in entry else []
    for key, value in entry.items():
        if key.startswith("train/") and key.endswith("loss"):
            name = key.removeprefix("train/")
            level = entry.get(f"chance/{name}")
            digits = 2 if brief else 3
            chance = "" if level is None else f"/{level:.2f}" if brief else f" (chance {level:.3f})"
            parts.append(f"{name.removesuffix('_loss')} {value:.{digits}f}{chance}")
    return "  ".join(parts)
