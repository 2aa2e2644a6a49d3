"""Around one training: signals, lost ranks and a full memory end it in order, each with an exit code of its own."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from blip2train import exit_code
from blip2train.errors import Blip2TrainError
from blip2train.run_dir import RunDir

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from blip2train.callback.stop_signal import StopSignal

log = logging.getLogger(__name__)

TEARDOWN_SECONDS = 30.0
"""For a process whose collectives have failed to end by itself."""
LAST_WORD_SECONDS = 600.0
"""For the main rank to note how the run ended, and to finish its loggers."""


class Guard:
    """Within `with`: a training. Give it the trainer's callbacks and the trainer, and end with `outcome`.

    Args:
        config: the train config.
        run: its run folder.
        stop: hears the signals since before this.
    """

    def __init__(self, config: DictConfig, run: RunDir, stop: StopSignal) -> None:
        from blip2train.callback.interrupt import InterruptCallback
        from blip2train.callback.watchdog import BatchDoneCallback, WatchdogCallback

        self._config = config
        self._stop = stop
        self._watchdog = WatchdogCallback(run, **config.watchdog)
        self._interrupt = InterruptCallback(self._stop)
        self._batch_done = BatchDoneCallback(self._watchdog)

    def callbacks(self, others: list[pl.Callback]) -> list[pl.Callback]:
        """All callbacks in order: the watchdog sees each batch begin before the others, and end after them."""
        return [self._watchdog, self._interrupt, *others, self._batch_done]

    def attach(self, trainer: pl.Trainer) -> None:
        """Before `fit`: Lightning's own handling of signals and of its processes goes."""
        from blip2train.callback.child_launcher import adopt_launcher
        from blip2train.callback.interrupt import silence_lightning

        self._watchdog.watch_parent()
        silence_lightning(trainer)
        adopt_launcher(trainer)

    def stopped_by(self, *, finished: bool) -> tuple[str | None, int]:
        """After `fit`: the signal that ended it early, and the exit code. Ranks but the main one wait for that one."""
        agreed = self._interrupt.agreed
        if finished or not agreed:
            return None, exit_code.DONE
        return self._stop.signal_name or "signal on another rank", agreed.exit_code

    @property
    def heard(self) -> str | None:
        """The first signal that this process has heard, also one that came too late to end the training."""
        return self._stop.signal_name or None

    def leave_together(self) -> None:
        """The main rank last, for it notes how the run ended."""
        if self._interrupt.last_word is not None:
            self._interrupt.last_word.wait(LAST_WORD_SECONDS)

    def __enter__(self) -> Guard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._explain(error)

    def _explain(self, error: BaseException) -> None:
        from blip2train.callback.stop_signal import leave_within
        from blip2train.cli.out_of_memory import is_out_of_memory, out_of_memory
        from blip2train.distributed import world_size
        from blip2train.peers import is_lost_peer

        if is_out_of_memory(error):
            self._watchdog.leave(exit_code.USER_ERROR, "out of memory")
            raise out_of_memory(self._config, self._watchdog.doing, error, alone=world_size() == 1) from error
        if world_size() > 1 and is_lost_peer(error):
            log.error("a collective has failed: %s", str(error).strip().splitlines()[0])
            code = self._watchdog.why_lost()
            leave_within(TEARDOWN_SECONDS, code)
            raise SystemExit(code) from error
        code = error_code(error)
        if code:
            self._watchdog.leave(code, f"{type(error).__name__}: {error}".splitlines()[0])


def error_code(error: BaseException) -> int:
    """Exit code of a process that an exception ends."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else exit_code.CRASHED if error.code else exit_code.DONE
    if isinstance(error, KeyboardInterrupt):
        return exit_code.INTERRUPTED
    return exit_code.USER_ERROR if isinstance(error, Blip2TrainError) else exit_code.CRASHED
