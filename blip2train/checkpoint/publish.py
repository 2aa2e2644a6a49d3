"""A folder written aside -> the checkpoint under its name, by one rename: a reader sees the whole of it or nothing.

A kill between any two of these calls leaves leftovers with a dot in front, which nobody reads and which the next start
clears. LAVIS writes under the final name.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from blip2train.checkpoint.verify import sync

_LEFTOVERS = (".step-*.partial", ".step-*.replaced", ".step-*.deleted")


def partial_of(final: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return _aside(final, "partial")


def publish(final: Path) -> None:
    """Give the sealed folder `partial_of(final)` its name; one that has it already is replaced.

    Raises:
        OSError: the disk refuses.
    """
    replaced = _aside(final, "replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial_of(final).rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def delete(checkpoint: Path) -> None:
    """Take a checkpoint away: first its name, so that half of it is never taken for a damaged one.

    Raises:
        OSError: the disk refuses.
    """
    aside = _aside(checkpoint, "deleted")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def clear_leftovers(checkpoints: Path) -> None:
    """Remove what a killed run left half written or half deleted."""
    for pattern in _LEFTOVERS:
        for leftover in checkpoints.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _aside(checkpoint: Path, why: str) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.{why}")
