"""Shard tasks -> reports, in this process or in many; what is made does not depend on how many.

Implements parallel packing. A stop (Ctrl-C, an error, a full disk) lets no process write on: each leaves after the
image it has in hand. When the parent is killed outright, they notice and end.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blip2train.data.pack_worker import PackSettings, ShardReport, ShardTask, make_shard
from blip2train.data.worker_process import end_with_parent, submit, worker_context
from blip2train.errors import DataError

OnRows = Callable[[int, int], None]
"""Called with (rows, bytes) done since the start."""

_SECONDS_BETWEEN_LOOKS = 0.5
_QUEUED_TASKS = 2
"""Beyond one per process: enough to keep them busy, few enough to hold little in memory."""

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
    running: set[Future[ShardReport]] = set()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (shared,))
    try:
        is_open = True
        while is_open or running:
            while is_open and len(running) < workers + _QUEUED_TASKS:
                task = next(tasks, None)
                if task is None:
                    is_open = False
                else:
                    running.add(submit(pool, make, task))
            finished, running = wait(running, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
            on_rows(shared[_ROWS], shared[_BYTES])
            for future in finished:
                yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a packing process was killed, perhaps for want of memory, or could not start",
            where=f"workers={workers}",
            fix="repeat the command: it continues; with fewer workers= if it happens again, or with workers=1",
        ) from error
    finally:
        shared[_STOP] = 1
        pool.shutdown(wait=True, cancel_futures=True)


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
