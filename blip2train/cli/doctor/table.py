"""Rows of the doctor on the screen, as they come: one table that grows, and a moving line for the check under way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blip2train.cli.doctor.row import STATUSES, Row

_COLORS = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "dim"}
_WIDTH_IN_A_FILE = 160
_FIXED = (("check", 12), ("result", 6))


class LiveTable:
    """Prints rows below each other in columns of one width.

    Args:
        shown: False prints nothing: another process of the launch does.
    """

    def __init__(self, shown: bool = True) -> None:
        self._console = Console(quiet=not shown)
        if not self._console.is_terminal:
            self._console.width = _WIDTH_IN_A_FILE
        self._begun = False

    def add(self, rows: Sequence[Row]) -> None:
        """Show the rows of one check."""
        table = Table(show_header=not self._begun, box=None, pad_edge=False, expand=True)
        for name, width in _FIXED:
            table.add_column(name, width=width, no_wrap=True)
        table.add_column("measured", ratio=3, overflow="fold")
        table.add_column("what to do", ratio=2, overflow="fold")
        for row in rows:
            status = f"[{_COLORS[row.status]}]{row.status}[/]"
            table.add_row(row.check, status, escape(row.measured), escape(row.advice))
        if rows:
            self._console.print(table, highlight=False)
            self._begun = True

    def finish(self, rows: Sequence[Row]) -> None:
        """Show how many rows went how."""
        counts = Counter(row.status for row in rows)
        words = {"ok": "ok", "warn": "to look at", "fail": "failed", "skip": "not tried"}
        said = ", ".join(f"[{_COLORS[each]}]{counts[each]} {words[each]}[/]" for each in STATUSES[::-1] if counts[each])
        self._console.print(f"\n{said}", highlight=False)

    @contextmanager
    def working(self, name: str) -> Iterator[Callable[[str], None]]:
        """Show that a check is under way; yields what it says how far it is with. Nothing in a log file."""
        if not self._console.is_terminal or self._console.quiet:
            yield lambda text: None
            return
        with self._console.status(name) as status:
            yield lambda text: status.update(escape(f"{name}: {text}" if text else name))
