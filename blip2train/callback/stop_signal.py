"""SIGINT, SIGTERM and SIGUSR1 -> a wish to stop, heard whatever the main thread is doing.

Ctrl-C asks once for a checkpoint and an end, twice for an end at once. SIGTERM and SIGUSR1 come from schedulers, often
several of them, and every repetition means the same. Before training there is nothing to write: any of them ends it.

A Python handler does not run while the main thread waits inside a collective, so a second thread hears the signal by
`signal.set_wakeup_fd` and ends a process that cannot end itself. LAVIS handles no signal.
"""

from __future__ import annotations

import enum
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from blip2train import exit_code

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_KEYSTROKE_SECONDS = 1.0
"""torchrun passes a Ctrl-C on to workers that the terminal has sent it to already."""
LEAVE_SECONDS = 10.0
"""What an orderly end may take before the process is ended from outside of it."""
PARENT_AT_START = os.getppid()
"""Asked before the imports that take seconds, in which a launcher may die."""
_END = b"\0"
"""Ends the listener: no signal has this number."""


class Wish(enum.IntEnum):
    """Why to stop; the larger one wins where ranks differ."""

    NONE = 0
    INTERRUPT = 1
    PREEMPT = 2

    @property
    def exit_code(self) -> int:
        return (exit_code.DONE, exit_code.INTERRUPTED, exit_code.REQUEUE)[self]


class StopSignal:
    """Within `with`: signals are noted in `wish` during a training, and end the process before it or when repeated.

    Outside of the main thread it hears nothing. Forked loader workers leave all signals to their parent.
    """

    def __init__(self) -> None:
        self.wish, self.signal_name = Wish.NONE, ""
        self.training = False
        self._interrupted_at: float | None = None
        self._leaving: int | None = None
        self._raised = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), name="stop-signal", daemon=True).start()
        self._previous = {number: signal.signal(number, self._leave_if_asked) for number in SIGNALS}
        _listening.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._previous:
            return
        _listening.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._writer, _END)
        os.close(self._writer)

    def _leave_if_asked(self, number: int, frame: FrameType | None) -> None:
        """In the main thread; the other one decides and sends the signal once more to bring the decision here."""
        if self._leaving is not None and not self._raised:
            self._raised = True
            raise SystemExit(self._leaving)

    def _listen(self, reader: int) -> None:
        main = threading.main_thread().ident
        assert main is not None
        with os.fdopen(reader, "rb", buffering=0) as signals:
            while (byte := signals.read(1)) not in (b"", _END):
                number = byte[0]
                if number not in SIGNALS or self._leaving is not None:
                    continue
                message, code = self._note(number, time.monotonic())
                if code is not None:
                    leave_within(LEAVE_SECONDS, code)  # first: a message may have to wait for a lock
                if message:
                    log.warning("%s: %s", signal.Signals(number).name, message)
                if code is not None:
                    self._leaving = code
                    signal.pthread_kill(main, number)

    def _note(self, number: int, now: float) -> tuple[str, int | None]:
        """Take notice of a signal; returns what to say about it, and the code to leave with at once, if that is it."""
        again = False
        if number == signal.SIGINT:
            again = self._interrupted_at is not None and now - self._interrupted_at > SAME_KEYSTROKE_SECONDS
            self._interrupted_at = self._interrupted_at or now
        first = not self.wish
        self.wish = max(self.wish, Wish.INTERRUPT if number == signal.SIGINT else Wish.PREEMPT)
        self.signal_name = self.signal_name or signal.Signals(number).name
        if again or not self.training:
            code = exit_code.INTERRUPTED if again else self.wish.exit_code
            return "leaving at once; what was saved before is kept", code
        if not first:
            return "", None
        more = "; Ctrl-C once more leaves without one" if number == signal.SIGINT else ""
        return f"stopping after this step with a checkpoint{more}", None


_listening: list[StopSignal] = []


def leave_within(seconds: float, code: int) -> None:
    """Let the process end by itself for so long, then end it, whatever its main thread waits for."""
    timer = threading.Timer(seconds, leave_now, args=(code,))
    timer.daemon = True
    timer.start()


def leave_now(code: int) -> NoReturn:
    """End the process from any thread, without asking the main thread, and with its last words written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # closed, or a pipe that nobody reads: nothing to say it to
    os._exit(code)


def _in_forked_child() -> None:
    """A loader worker must outlive the signals that a terminal or scheduler sends to all processes of a job.

    Its batches are needed for the last step. The parent's `terminate` reaches it still.
    """
    if not _listening:
        return
    _listening.clear()
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_wait_for_parents_word, args=(os.getppid(),), daemon=True).start()


def _wait_for_parents_word(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)


os.register_at_fork(after_in_child=_in_forked_child)
