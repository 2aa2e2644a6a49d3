"""Shard tasks -> reports, in this process or in many; what is made does not depend on how many.

Implements parallel packing. A stop (Ctrl-C, an error, a full disk) lets no process write on: each leaves after the
image it has in hand. When the parent is killed outright, they notice and end.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blip2train.data.pack_worker import PackSettings, ShardReport, ShardTask, make_shard
from blip2train.data.worker_process import end_with_parent, run_tasks, worker_context, worker_pool

OnRows = Callable[[int, int], None]
"""Called with (rows, bytes) done since the start."""

_ROWS, _BYTES, _STOP = range(3)
_shared: Any = None  # of a worker process: what the pool's initializer gave it


class _StopError(Exception):
    """The parent wants no more."""


def make_shards(
    tasks: Iterator[ShardTask], folder: Path, settings: PackSettings, workers: int, on_rows: OnRows
) -> Generator[ShardReport, None, None]:
    """Yield reports as shards are finished, in any order.

    Args:
        tasks: made on demand.
        folder: of the shards.
        settings: how to make them.
        workers: processes; with one, the work is done in this process.
        on_rows: how far the work is.

    Raises:
        DataError: a process was killed.
        OSError: the disk is full or gone.
    """
    make = partial(_in_process, folder=folder, settings=settings)
    if workers > 1:
        yield from _in_pool(tasks, make, workers, on_rows)
        return
    done = [0, 0]

    def on_row(num_bytes: int) -> None:
        done[_ROWS] += 1
        done[_BYTES] += num_bytes
        on_rows(*done)

    for task in tasks:
        yield make_shard(task, folder, settings, on_row)


def _in_pool(
    tasks: Iterator[ShardTask], make: Callable[[ShardTask], ShardReport], workers: int, on_rows: OnRows
) -> Generator[ShardReport, None, None]:
    context = worker_context(__name__)
    shared = context.Array("q", 3)
    fix = "repeat the command: it continues; with fewer workers= if it happens again, or with workers=1"

    def look() -> None:
        on_rows(shared[_ROWS], shared[_BYTES])

    with worker_pool(context, workers, fix, _start_worker, (shared,)) as pool:
        try:
            for _, report in run_tasks(pool, make, tasks, workers, look):
                yield report
        finally:
            shared[_STOP] = 1  # before the processes are waited for


def _start_worker(shared: Any) -> None:
    global _shared
    _shared = shared
    torch.set_num_threads(1)
    end_with_parent()


def _in_process(task: ShardTask, folder: Path, settings: PackSettings) -> ShardReport:
    def on_row(num_bytes: int) -> None:
        if _shared[_STOP]:
            raise _StopError
        with _shared.get_lock():
            _shared[_ROWS] += 1
            _shared[_BYTES] += num_bytes

    return make_shard(task, folder, settings, on_row)
