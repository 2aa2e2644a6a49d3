"""A run that goes on no more reports which rank is to blame and ends with a code that requeues it.

A thread on every rank writes its heartbeat and looks whether batches are still completed, also while the main thread
hangs inside a collective. LAVIS hangs for the year its timeout is set to.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from blip2train import exit_code
from blip2train.callback.heartbeat import (
    Heartbeat,
    Watch,
    heartbeat_path,
    report,
    stack_path,
    write_heartbeat,
)
from blip2train.callback.stop_signal import LEAVE_SECONDS, PARENT_AT_START, leave_now
from blip2train.run_dir import RunDir, write_json

log = logging.getLogger(__name__)

SILENT_BEATS = 24
"""Heartbeats that a rank may miss: a shared file system shows others a new file up to a minute late."""
SUSPICIOUS_BEATS = 6
"""Without a completed batch for so long, a rank starts to look at the others."""
PARENT_SECONDS = 1.0
"""Between two looks whether the launcher is still there."""
STOPPED_BEATS = 5
"""A gap as long between two of its own beats means that this very process was stopped, and nobody is to blame."""


class WatchdogCallback(pl.Callback):
    """Keeps the heartbeat; ends the process with `REQUEUE` when nothing goes on. First of the callbacks.

    Args:
        run: the run folder; heartbeats and stacks go to ranks/, the report to stuck.json.
        stuck_minutes: without a completed batch or checkpoint for so long the run is stuck; None: never.
        start_minutes: the same for the first batch, which waits for loaders and kernels; None: never.
        heartbeat_seconds: between two heartbeats.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        stuck_minutes: float | None = 15,
        start_minutes: float | None = 60,
        heartbeat_seconds: float = 5.0,
    ) -> None:
        self.run, self.heartbeat_seconds = run, heartbeat_seconds
        self._limits = (start_minutes, stuck_minutes)
        self._host = socket.gethostname()
        self._rank, self._world = 0, 1
        self._beat = self._step = self._batch = 0
        self._phase, self._phase_since = "start", time.monotonic()
        self._progress_at: float | None = None
        self._stop = threading.Event()
        self._writing = threading.Lock()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._rank, self._world = trainer.global_rank, trainer.world_size
        heartbeat_path(self.run.ranks, self._rank).unlink(missing_ok=True)  # of the process before this one
        _set_aside(stack_path(self.run.ranks, self._rank))
        if self._rank == 0:
            _set_aside(self.run.stuck_path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self._enter("data", progress=True)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enter("forward")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self._enter("backward")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._enter("optimizer")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step
        self._enter("after the step")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._enter("checkpoint", progress=True)

    def batch_done(self) -> None:
        """All callbacks are through; what comes next is the next batch."""
        self._batch += 1
        self._enter("data", progress=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enter("end", progress=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.leave(exit_code.DONE, "")

    def watch_parent(self) -> None:
        """From before the rendezvous on: a process whose launcher has died leaves, whatever it waits for.

        The launcher is Lightning's main process or torchrun's agent; that of a main process may be a closed terminal.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("LOCAL_RANK", "0") != "0":
            threading.Thread(target=self._leave_with_parent, name="parent", daemon=True).start()

    def _leave_with_parent(self) -> None:
        while os.getppid() == PARENT_AT_START:
            time.sleep(PARENT_SECONDS)
        if self._stop.is_set():
            time.sleep(LEAVE_SECONDS)  # it has failed by itself and is about to say why
        log.warning("rank %d: the process that started it is gone; leaving", self._rank)
        watch = Watch(self.run.ranks, self._world, self._host, SILENT_BEATS * self.heartbeat_seconds)
        wrong = watch.look(time.monotonic(), final=True)
        wrong.pop(self._rank, None)
        if wrong:
            self._report(watch, wrong, time.monotonic() - (self._progress_at or self._phase_since))
        leave_now(watch.exit_code())

    @property
    def doing(self) -> str:
        """What the main thread is at, in words."""
        return "start" if self._phase == "start" else f"{self._phase} of batch {self._batch + 1} (step {self._step})"

    def leave(self, code: int, reason: str) -> None:
        """The last heartbeat of a process that ends by itself: others then know why it does not answer any more."""
        self._stop.set()
        if self._world > 1 or self._beat:
            self._write(left=code, reason=reason)

    def why_lost(self, patience: float = 3.0) -> int:
        """For a rank whose collective has failed: who is gone, said aloud; returns the exit code to leave with."""
        watch = Watch(self.run.ranks, self._world, self._host, silent_after=patience)
        deadline = time.monotonic() + patience + 2 * self.heartbeat_seconds
        wrong: dict[int, str] = {}
        while time.monotonic() < deadline and not wrong:
            wrong = {rank: state for rank, state in watch.look(time.monotonic()).items() if rank != self._rank}
            time.sleep(0.1)
        self._report(watch, wrong, time.monotonic() - (self._progress_at or self._phase_since))
        return watch.exit_code()

    def _enter(self, phase: str, *, progress: bool = False) -> None:
        self._phase, self._phase_since = phase, time.monotonic()
        if progress:
            self._progress_at = self._phase_since

    def _write(self, left: int | None = None, reason: str = "") -> None:
        with self._writing:
            self._beat += 1
            seconds = round(time.monotonic() - self._phase_since, 1)
            place = (self._step, self._batch, self._phase, seconds)
            try:
                write_heartbeat(
                    self.run.ranks, Heartbeat(self._rank, self._host, os.getpid(), self._beat, *place, left, reason)
                )
            except OSError as error:  # a full disk must not end a run that a watchdog watches
                log.debug("no heartbeat: %s", error)

    def _watch(self) -> None:
        watch = Watch(self.run.ranks, self._world, self._host, SILENT_BEATS * self.heartbeat_seconds)
        before = time.monotonic()
        self._write()
        while not self._stop.wait(self.heartbeat_seconds):
            now = time.monotonic()
            if now - before > STOPPED_BEATS * self.heartbeat_seconds and self._progress_at is not None:
                self._progress_at += now - before
            before = now
            if not self._stop.is_set():
                self._write()
            self._judge(watch, now)

    def _judge(self, watch: Watch, now: float) -> None:
        waited = now - (self._progress_at or now)
        if waited < SUSPICIOUS_BEATS * self.heartbeat_seconds:
            return
        wrong = watch.look(now) if self._world > 1 else {}
        wrong.pop(self._rank, None)
        limit = self._limits[self._batch > 0]
        stuck = limit is not None and waited > limit * 60 and sys.gettrace() is None
        if wrong or stuck:
            self._give_up(watch, waited)

    def _give_up(self, watch: Watch, waited: float) -> None:
        """Write the stacks, let the others do the same, report once, end the process."""
        try:
            with stack_path(self.run.ranks, self._rank).open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # a full disk must not keep a stuck run from leaving
            log.error("no stacks: %s", error)
        self._write()
        time.sleep(2 * self.heartbeat_seconds)
        wrong = watch.look(time.monotonic(), final=True)
        wrong.pop(self._rank, None)
        if self._rank == min(rank for rank in range(self._world) if rank not in wrong):
            self._report(watch, wrong, waited)
        else:
            time.sleep(2 * self.heartbeat_seconds)  # a launcher ends the reporter as soon as another rank has left
        leave_now(watch.exit_code())

    def _report(self, watch: Watch, wrong: dict[int, str], waited: float) -> None:
        if self.run.stuck_path.exists():
            return  # another rank was first, and has left since
        found = report(watch.heartbeats(), wrong, by_rank=self._rank, seconds=waited)
        try:
            write_json(self.run.stuck_path, found)
        except OSError as error:
            log.error("%s could not be written: %s", self.run.stuck_path, error)
        log.error("%s\n(%s)", found["text"], self.run.stuck_path)


def _set_aside(path: Path) -> None:
    """A run that is requeued starts at once: its report must outlive that."""
    with contextlib.suppress(FileNotFoundError):
        path.replace(path.with_suffix(f".before{path.suffix}"))


class BatchDoneCallback(pl.Callback):
    """Last of the callbacks: tells the watchdog that the others are through with a batch."""

    def __init__(self, watchdog: WatchdogCallback) -> None:
        self._watchdog = watchdog

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._watchdog.batch_done()
