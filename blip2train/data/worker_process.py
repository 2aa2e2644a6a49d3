"""Processes that share the shards of one command: started apart from the parent's threads, ended with the parent.

Implements no part of the paper; packing, checking and indexing start their processes here. LAVIS has only the workers
of torch's loader.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from types import FrameType
from typing import Any, TypeVar

from blip2train.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_SECONDS_BETWEEN_LOOKS = 0.5
_QUEUED = 2
"""Tasks beyond one per process: enough to keep them busy, few enough to hold little in memory."""


def worker_context(module: str) -> ForkServerContext:
    """Where processes come from that Ctrl-C does not reach: it is the parent's to answer, even while they import.

    Args:
        module: what they import before the first is started.
    """
    # not fork: the parent has threads (torch, the progress bar), whose locks a forked child would inherit
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    resource_tracker.ensure_running()  # before the mask: starting it lifts the mask again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return context


@contextmanager
def worker_pool(
    context: ForkServerContext,
    workers: int,
    fix: str,
    start: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[ProcessPoolExecutor]:
    """Processes that are waited for when the block ends; what is queued then is not begun.

    Args:
        context: as `worker_context` gives it.
        workers: processes.
        fix: what to do when one of them was killed, for the message.
        start: called with `arguments` in each of them before its first task; None: `end_with_parent`.
        arguments: picklable, or locks and shared memory of `context`.

    Raises:
        DataError: a process was killed, or ended while it started.
    """
    pool = ProcessPoolExecutor(workers, context, start or end_with_parent, arguments)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps for want of memory, or could not start",
            where=f"workers={workers}",
            fix=fix,
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_tasks(
    pool: ProcessPoolExecutor,
    function: Callable[[T], R],
    tasks: Iterable[T],
    workers: int,
    look: Callable[[], None] | None = None,
) -> Iterator[tuple[int, R]]:
    """Run a function over tasks, which are taken as they are needed.

    Args:
        pool: of `worker_pool`.
        function: of one task; picklable, as tasks and results are.
        tasks: as many as there are.
        workers: processes of the pool.
        look: called whenever a task is finished, and twice a second.

    Yields:
        (number of the task, what the function gave), in the order in which they are finished.
    """
    numbered = enumerate(tasks)
    running: dict[Future[R], int] = {}
    while True:
        for number, task in islice(numbered, workers + _QUEUED - len(running)):
            running[submit(pool, function, task)] = number
        if not running:
            return
        finished = wait(running, _SECONDS_BETWEEN_LOOKS if look else None, FIRST_COMPLETED).done
        if look is not None:
            look()
        for future in finished:
            yield running.pop(future), future.result()


def submit(pool: ProcessPoolExecutor, function: Callable[[T], R], task: T) -> Future[R]:
    """`pool.submit`, which may start a process: Ctrl-C waits until that is done.

    Else the pool would not know the process and not wait for it, and it would complain that its parent is gone.
    """
    with _held_interrupts():
        return pool.submit(function, task)


def end_with_parent() -> None:
    """Called in such a process: it ends when the parent is killed outright, instead of waiting for work forever."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


@contextmanager
def _held_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held and callable(before):
            before(*held[0])


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
