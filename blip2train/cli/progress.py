"""How far long work has come: a bar with rate and ETA on a terminal, a line a minute in a log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Task
    from rich.text import Text

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 60.0


class ShowProgress(Protocol):
    def __call__(self, done: int, total: int | None, num_bytes: int | None = None) -> None:
        """Show how far the work is.

        Args:
            done: items, growing; the first call may count what an earlier run has done.
            total: items in all, if known.
            num_bytes: read or written so far, where their rate is worth knowing.
        """


class Rate:
    """Items and bytes per second since the first call; what an earlier run had done does not count."""

    def __init__(self) -> None:
        self._start: tuple[float, int, int] | None = None
        self._now: tuple[float, int, int] = (0.0, 0, 0)
        self.total: int | None = None

    def update(self, done: int, total: int | None, num_bytes: int | None, when: float) -> None:
        self._now, self.total = (when, done, num_bytes or 0), total
        self._start = self._start or self._now

    def text(self) -> str:
        """For instance "812/s, 33.1 MB/s, 0:04:10 left"; empty while there is nothing to divide."""
        if self._start is None or self._now[0] <= self._start[0] or self._now[1] <= self._start[1]:
            return ""
        seconds, items, num_bytes = (now - start for now, start in zip(self._now, self._start, strict=True))
        parts = [f"{items / seconds:.{0 if items > 20 * seconds else 1}f}/s"]
        if num_bytes:
            parts.append(f"{num_bytes / seconds / 1e6:.1f} MB/s")
        if self.total is not None:
            parts.append(f"{timedelta(seconds=round((self.total - self._now[1]) * seconds / items))} left")
        return ", ".join(parts)


@contextmanager
def show_progress(title: str) -> Iterator[ShowProgress]:
    """Yield what long work calls with (done, total, bytes); shown on a terminal, logged once a minute elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn

    rate = Rate()

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            from rich.text import Text

            return Text(rate.text())

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn())
    last_line = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def show(done: int, total: int | None, num_bytes: int | None = None) -> None:
            nonlocal last_line
            now = time.monotonic()
            rate.update(done, total, num_bytes, now)
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and now - last_line >= _SECONDS_BETWEEN_LINES:
                last_line = now
                log.info("%s: %s of %s, %s", title, f"{done:,}", "?" if total is None else f"{total:,}", rate.text())

        yield show
