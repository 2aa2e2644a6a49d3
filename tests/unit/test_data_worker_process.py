"""Processes of a command are out of Ctrl-C's reach from their first import on, and end when their parent is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blip2train.data.worker_process import run_tasks, worker_context, worker_pool
from blip2train.errors import DataError

PARENT = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.forkserver import _forkserver
from blip2train.data.worker_process import end_with_parent, worker_context
pool = ProcessPoolExecutor(2, worker_context("json"), end_with_parent)
workers = {pool.submit(os.getpid).result() for _ in range(2)}
print(_forkserver._forkserver_pid, *workers, flush=True)
time.sleep(60)
"""


def test_processes_block_ctrl_c_and_end_when_their_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) >= 2
        assert [_blocks(pid, signal.SIGINT) for pid in pids] == [True] * len(pids)
        assert not _blocks(parent.pid, signal.SIGINT)
    finally:
        parent.kill()
        parent.communicate()
    end = time.monotonic() + 20
    while (left := [pid for pid in pids if _is_alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


INTERRUPTED = """
import os, signal, threading
from concurrent.futures import ProcessPoolExecutor
from blip2train.data.worker_process import end_with_parent, submit, worker_context
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests in its background
pool = ProcessPoolExecutor(1, worker_context("slow_import"), end_with_parent)
threading.Timer(0.3, os.killpg, (0, signal.SIGINT)).start()
try:
    submit(pool, abs, -1).result()
except KeyboardInterrupt:
    print("interrupted")
finally:
    pool.shutdown(wait=True, cancel_futures=True)
"""


def test_ctrl_c_while_processes_start_leaves_no_complaint(tmp_path: Path) -> None:
    (tmp_path / "slow_import.py").write_text("import time\ntime.sleep(1.5)\n")
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


def test_every_task_is_done_once_and_none_is_made_long_before_it_is_needed() -> None:
    made: list[int] = []
    looks: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(12):
            made.append(number)
            yield -number

    done: list[tuple[int, int]] = []
    with worker_pool(worker_context("json"), 2, "wait") as pool:
        for pair in run_tasks(pool, abs, tasks(), 2, lambda: looks.append(len(done))):
            done.append(pair)
            assert len(made) <= len(done) + 2 + 2
    assert sorted(done) == [(number, number) for number in range(12)] == [(number, number) for number in made]
    assert looks


def test_a_killed_process_and_the_error_of_a_task_are_told_apart() -> None:
    with (
        pytest.raises(DataError, match=r"killed, perhaps for want of memory.*\n.*workers=2.*\n.*take fewer"),
        worker_pool(worker_context("json"), 2, "take fewer") as pool,
    ):
        list(run_tasks(pool, os._exit, [1], 2))
    with (
        pytest.raises(ValueError, match="invalid literal"),
        worker_pool(worker_context("json"), 2, "take fewer") as pool,
    ):
        list(run_tasks(pool, int, ["1", "x"], 2))


def _status(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


def _blocks(pid: int, number: signal.Signals) -> bool:
    return bool(int(_status(pid)["SigBlk"], 16) >> (number - 1) & 1)


def _is_alive(pid: int) -> bool:
    try:
        return not _status(pid)["State"].startswith(("Z", "X"))
    except (FileNotFoundError, ProcessLookupError):
        return False
