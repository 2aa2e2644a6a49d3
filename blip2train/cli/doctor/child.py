"""Child processes of a check: their own process groups, an end after a time, and the last words of one that failed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LAST_BYTES = 20_000
_OWN_ERROR = re.compile(
    r"^(?:ConfigError|DataError|CheckpointError): (?P<found>.*?)\n  where: (?P<where>.*?)\n"
    r"  fix:   (?P<fix>[^\n]*(?:\n {9}[^\n]+)*)",
    re.MULTILINE | re.DOTALL,
)
_OTHER_ERROR = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How some children ended.

    Args:
        codes: exit codes in the order of the children; negative: killed by that signal; None: did not end in time.
        log: the end of what they wrote.
        seconds: they took.
        stopped_by_others: another process of the launch had failed before; nothing is to be told here.
    """

    codes: tuple[int | None, ...]
    log: str
    seconds: float
    stopped_by_others: bool = False

    @property
    def good(self) -> bool:
        return all(code == 0 for code in self.codes)


def run_children(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    log_file: Path,
    seconds: float,
    say: Callable[[str], None],
    alarm: Path | None = None,
    patience: float = 5.0,
) -> Outcome:
    """Run one command in as many processes as there are environments, at the same time, and wait for all.

    When one fails the others are stopped: they would wait for it. None of them, nor what they started, is left.

    Args:
        command: module and arguments behind `python -m`.
        environments: one per process.
        log_file: what all of them write goes here.
        seconds: they may take.
        say: called with their last line now and then.
        alarm: a file that the first of several such calls makes whose child failed; the others then stop theirs.
        patience: seconds that the others have to end by themselves, which they mostly do with words that help.
    """
    started = time.monotonic()
    with log_file.open("wb") as sink:
        children = [
            subprocess.Popen(
                [sys.executable, "-m", *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for environment in environments
        ]
        try:
            while time.monotonic() - started < seconds:
                codes = [child.poll() for child in children]
                if all(code is not None for code in codes) or any(codes) or (alarm is not None and alarm.exists()):
                    break
                say(_last_line(log_file))
                time.sleep(0.2)
            told = alarm is not None and alarm.exists()
            if any(child.poll() for child in children) or told:
                _wait_a_little(children, patience)
            codes = [child.poll() for child in children]
            if alarm is not None and any(codes) and not told:
                alarm.touch()
        finally:
            for child in children:
                _end(child)
    return Outcome(tuple(codes), read_end(log_file), time.monotonic() - started, stopped_by_others=told)


def _wait_a_little(children: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(child.poll() is None for child in children):
        time.sleep(0.1)


def _end(child: subprocess.Popen[bytes]) -> None:
    """The child and all it started: they are a process group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(2.0)
            if number == signal.SIGKILL:
                return
    child.wait()


def read_end(path: Path) -> str:
    """The end of a log, as text."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LAST_BYTES))
        return file.read().decode("utf-8", "replace")


def _last_line(path: Path) -> str:
    lines = read_end(path).split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:100]


def last_words(outcome: Outcome) -> tuple[str, str]:
    """(what went wrong, what to do) of children that failed, from what they wrote."""
    own = list(_OWN_ERROR.finditer(outcome.log))
    if own:
        last = own[-1]
        return f"{' '.join(last['found'].split())} ({last['where']})", " ".join(last["fix"].split())
    killed = next((-code for code in outcome.codes if code is not None and code < 0), None)
    others = _OTHER_ERROR.findall(outcome.log)
    said = others[-1] if others else _tail_line(outcome.log)
    if any(code is None for code in outcome.codes) and killed is None and not others:
        return f"no end after {outcome.seconds:.0f} s; the last line: {said}", "check_minutes= gives it longer"
    if killed == signal.SIGKILL:
        return f"killed by the system (SIGKILL) after {outcome.seconds:.0f} s", (
            "most likely out of main memory: fewer data.num_workers, a smaller data.batch_size, or a larger machine"
        )
    if killed is not None:
        return f"killed by signal {signal.Signals(killed).name}: {said}", "see the last lines of the log"
    return said, "see the last lines of the log"


def _tail_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "it wrote nothing")
