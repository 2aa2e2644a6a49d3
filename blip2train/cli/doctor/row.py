"""What a check says: a name, how it went, what was measured and what to do; and how a check is run apart from the rest.

A check that crashes or does not end is a row that says so, and the others go on. LAVIS has no such command: what is
wrong with a machine shows in the first hours of a run, or in its first checkpoint.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from blip2train.errors import Blip2TrainError

log = logging.getLogger(__name__)

Status = Literal["ok", "warn", "fail", "skip"]
STATUSES: tuple[Status, ...] = ("fail", "warn", "skip", "ok")
"""The worst first; `skip` is a check that could not be run because of another one's result."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the doctor's table.

    Args:
        check: the check it belongs to, the name that `only` and `skip` take.
        status: how it went.
        measured: what was found, with its units.
        advice: what to do; empty where nothing is to be done.
    """

    check: str
    status: Status
    measured: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def of_error(check: str, error: Exception) -> Row:
    """The row of a check that ended with an error: ours says what to do, another one is told as it is."""
    if isinstance(error, Blip2TrainError):
        return Row(check, "fail", f"{error.found} ({error.where})", error.fix)
    said = (str(error).strip().splitlines() or ["no message"])[0]
    return Row(check, "fail", f"{type(error).__name__}: {said}", "the check itself failed; look into what it names")


def run_apart(check: str, function: Callable[[], Iterable[Row]], seconds: float) -> list[Row]:
    """The rows of a check, whatever happens to it.

    It runs in a thread of its own: one that hangs, on a network drive for instance, is left behind and ends with the
    process.

    Args:
        check: its name.
        function: gives its rows; those it gave before an error are kept.
        seconds: it may take.
    """
    found: queue.SimpleQueue[Row | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for row in function():
                found.put(row)
        except Exception as error:  # whatever a library raises on a machine that is not in order
            log.debug("%s", check, exc_info=error)
            found.put(of_error(check, error))
        finally:
            found.put(None)

    thread = threading.Thread(target=work, name=f"doctor {check}", daemon=True)
    thread.start()
    thread.join(seconds)
    rows: list[Row] = []
    while not found.empty():
        row = found.get()
        if row is None:
            return rows
        rows.append(row)
    late = f"no end after {seconds:.0f} s"
    return [*rows, Row(check, "fail", late, "a hanging disk or network? check_minutes= gives it longer")]


def merge_nodes(by_node: Sequence[tuple[str, Sequence[Row]]]) -> list[Row]:
    """Rows that several machines found: those that all agree on once, others with the machine's name before them."""
    if len(by_node) == 1:
        return list(by_node[0][1])
    rows: list[Row] = []
    for name, found in by_node:
        for row in found:
            if all(row in others for _, others in by_node):
                if row not in rows:
                    rows.append(row)
            else:
                rows.append(replace(row, measured=f"{name}: {row.measured}"))
    return rows


def worst(rows: Iterable[Row]) -> Status:
    """The worst status of some rows; "ok" of none."""
    return min((row.status for row in rows), key=STATUSES.index, default="ok")
