"""A run folder and a name -> one of its checkpoints that is whole: "last", "best", or a named one.

Whoever needs a checkpoint asks here, so that a damaged one is passed over, or refused, in the same words everywhere.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip2train.checkpoint.verify import METADATA, WEIGHTS, problems
from blip2train.errors import CheckpointError
from blip2train.run_dir import RunDir, read_json

log = logging.getLogger(__name__)

LAST, BEST = "last", "best"
METRIC = "metric"
_NAME = re.compile(r"step-\d+")


def list_checkpoints(run: RunDir) -> list[Path]:
    """Checkpoints of a run by their names, oldest first; `problems` says whether one is whole."""
    found = [path for path in run.checkpoints.glob("step-*") if is_checkpoint_name(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name would be a checkpoint."""
    return _NAME.fullmatch(name) is not None


def step_of(checkpoint: Path) -> int:
    """Optimizer steps of a checkpoint folder, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def find_checkpoint(run: RunDir, which: str = LAST, *, files: Sequence[str] | None = (WEIGHTS,)) -> Path:
    """The checkpoint folder called `which` of a run.

    Args:
        run: the run folder.
        which: "last" or "best" (of those that are whole), or a name as "step-0000450".
        files: those that must be whole; None asks for all that were written.

    Raises:
        CheckpointError: there is none, or the one that was named is damaged.
    """
    known = list_checkpoints(run)
    named = {folder.name: folder for folder in known}
    if which in named:
        found = problems(named[which], files)
        if found:
            raise damaged_error(named[which], found)
        return named[which]
    if which == BEST:
        order = rank_by_metric([folder for folder in known if not _say_unfit(folder, problems(folder, ()))])
        if known and not order:
            raise CheckpointError(
                "no checkpoint of this run has a metric to be the best by",
                where=str(run.checkpoints),
                fix=f"name one: {', '.join(named)}; a run with checkpoint.best_metric= keeps its best",
            )
    else:
        order = known[::-1] if which == LAST else []
    good, passed_over = first_good(order, files)
    if good is None:
        raise _no_checkpoint(run, which, known, passed_over)
    return good


def first_good(order: Sequence[Path], files: Sequence[str] | None = None) -> tuple[Path | None, dict[Path, list[str]]]:
    """The first checkpoint that is whole, and what is wrong with those before it, which is also logged."""
    passed_over: dict[Path, list[str]] = {}
    for folder in order:
        found = problems(folder, files)
        if not found:
            if passed_over:
                log.warning("taking %s instead", folder.name)
            return folder, passed_over
        passed_over[folder] = found
        _say_unfit(folder, found)
    return None, passed_over


def _say_unfit(folder: Path, found: Sequence[str]) -> bool:
    if found:
        log.warning("%s is passed over: %s", folder, "; ".join(found))
    return bool(found)


def damaged_error(folder: Path, found: Sequence[str]) -> CheckpointError:
    """The error of a damaged checkpoint that was asked for by its name."""
    return CheckpointError(
        f"{folder.name} is damaged: {'; '.join(found)}",
        where=str(folder),
        fix="name another one, or take the last that is whole (checkpoint=last, resume=auto)",
    )


def _no_checkpoint(run: RunDir, which: str, known: list[Path], passed_over: dict[Path, list[str]]) -> CheckpointError:
    if passed_over:
        lines = "".join(f"\n    {folder.name}: {'; '.join(found)}" for folder, found in passed_over.items())
        return CheckpointError(
            f"none of {len(passed_over)} checkpoints is whole:{lines}",
            where=str(run.checkpoints),
            fix="copy the folder again from where it came, or train into another run_dir=",
        )
    names = ", ".join(folder.name for folder in known)
    close = difflib.get_close_matches(which, (LAST, BEST), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return CheckpointError(
        f"no checkpoint {which!r}",
        where=str(run.checkpoints),
        fix=f"known: {names or 'none; the run was stopped before its first'}{hint}",
    )


def rank_by_metric(checkpoints: Sequence[Path], name: str | None = None) -> list[Path]:
    """Checkpoints by the metric in their metadata, the best first; of equal ones, the older first.

    Args:
        checkpoints: oldest first.
        name: of the metric; None takes the one that the newest checkpoint was measured by.
    """
    measured = [(folder, metric) for folder in checkpoints if (metric := read_metric(folder)) is not None]
    if not measured:
        return []
    wanted = measured[-1][1]["name"] if name is None else name
    ranked = [(folder, metric) for folder, metric in measured if metric["name"] == wanted]
    sign = -1.0 if ranked and ranked[-1][1]["mode"] == "max" else 1.0
    return [folder for folder, metric in sorted(ranked, key=lambda item: sign * item[1]["value"])]


def read_metric(checkpoint: Path) -> dict[str, Any] | None:
    """`{"name", "mode", "value"}` that a checkpoint was measured by; None where it was not, or cannot be read."""
    try:
        metric = read_json(checkpoint / METADATA).get(METRIC)
        return metric if metric is not None and math.isfinite(metric["value"]) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
