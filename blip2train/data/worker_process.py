"""Processes that share the shards of one command: started apart from the parent's threads, ended with the parent.

Implements no part of the paper; packing, checking and indexing start their processes here. LAVIS has only the workers
of torch's loader.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from types import FrameType
from typing import Any


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


def submit(pool: ProcessPoolExecutor, function: Callable[[Any], Any], task: Any) -> Future[Any]:
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
    wait([parent.sentinel])
    os._exit(1)
