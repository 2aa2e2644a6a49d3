"""Lightning's launcher of one process per device, that lets an end be an end.

Lightning's own, seeing a child end with any code but 0, kills all processes within five seconds, the main one included:
a checkpoint that is being written with them, and the exit code that would have requeued the run.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from blip2train import exit_code
from blip2train.callback.stop_signal import leave_now

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
AFTER_ERROR_SECONDS = 120.0
"""For the main process to notice by itself, and to say so, that a child has failed; or to explain its own failure."""
AFTER_STOP_SECONDS = 600.0
"""For the main process to finish what a child that has stopped in order need not wait for."""


class ChildLauncher(_SubprocessScriptLauncher):
    """Starts the processes of this machine as Lightning does, and watches them with patience."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=watch_children, args=(self.procs,), name="children", daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


def adopt_launcher(trainer: pl.Trainer) -> None:
    """Put ours in the place of Lightning's, where the strategy uses that one."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        trainer.strategy._launcher = ChildLauncher(
            launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
        )


def watch_children(
    children: Sequence[subprocess.Popen[bytes]], leave: Callable[[int], Any] = leave_now, patience: float | None = None
) -> None:
    """Until all have ended: take the main process along where one has failed and the main one does not notice.

    Args:
        children: processes of this machine.
        leave: ends the main process.
        patience: seconds between a child's end and that; None takes the constants above.
    """
    while not (ended := [child.returncode for child in children if child.poll()]):
        if all(child.returncode == 0 for child in children):
            return
        time.sleep(POLL_SECONDS)
    code = leaving_code(ended)
    stopped = all(code in (exit_code.REQUEUE, exit_code.INTERRUPTED) for code in ended)
    time.sleep(patience if patience is not None else AFTER_STOP_SECONDS if stopped else AFTER_ERROR_SECONDS)
    log.error("a process of this machine has ended (exit status %s); leaving with %d", ended[0], code)
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
    leave(code)


def leaving_code(ended: Sequence[int]) -> int:
    """Exit code for a machine whose processes ended with these codes: an error of the user's or ours before all."""
    for code in (exit_code.USER_ERROR, exit_code.INTERRUPTED):
        if code in ended:
            return code
    failed = [code for code in ended if code > 0 and code != exit_code.REQUEUE]
    return failed[0] if failed else exit_code.REQUEUE
