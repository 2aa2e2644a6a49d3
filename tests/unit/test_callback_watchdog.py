"""The watchdog ends processes that hang in a real collective, and says which of two ranks is to blame."""

import json
import multiprocessing
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from blip2train.callback.watchdog import WatchdogCallback
from blip2train.run_dir import RunDir

FAST = {"heartbeat_seconds": 0.1, "stuck_minutes": 2 / 60, "start_minutes": 2 / 60}
CONTEXT = multiprocessing.get_context("fork")  # cheap: nothing is imported anew


def rank_of_two(rank: int, folder: str, fault: str) -> None:
    """Trains three batches in lockstep with the other rank; in the fourth, rank 1 has the fault."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    watchdog = WatchdogCallback(RunDir(Path(folder)), **FAST)
    trainer = SimpleNamespace(global_rank=rank, world_size=2, global_step=0)
    watchdog.setup(trainer, None, "fit")
    watchdog.on_train_start(trainer, None)
    for batch in range(40):
        if batch == 3 and rank == 1:
            have_fault(fault, watchdog)
        watchdog.on_train_batch_start(trainer, None, None, batch)
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError:
            sys.exit(watchdog.why_lost())
        trainer.global_step += 1
        watchdog.on_train_batch_end(trainer, None, None, None, batch)
        watchdog.batch_done()
        time.sleep(0.05)
    watchdog.on_fit_end(trainer, None)


def have_fault(fault: str, watchdog: WatchdogCallback) -> None:
    if fault == "sleeps":
        while True:
            time.sleep(1)
    elif fault == "user error":
        watchdog.leave(2, "DataError: no such shard")
        os._exit(2)
    else:
        os.kill(os.getpid(), getattr(signal, fault))


def two_ranks(folder: Path, fault: str) -> tuple[list[int | None], dict]:
    """Exit codes and the report; processes that hang for 30 s have none."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks = [CONTEXT.Process(target=rank_of_two, args=(rank, str(folder), fault)) for rank in range(2)]
    for process in ranks:
        process.start()
    ranks[0].join(30)
    if fault == "SIGSTOP":
        ranks[1].kill()
    ranks[1].join(30)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    found = folder / "stuck.json"
    return codes, json.loads(found.read_text()) if found.exists() else {}


def test_a_rank_asleep_at_its_data_is_named_and_both_leave_with_their_stacks(tmp_path: Path) -> None:
    codes, found = two_ranks(tmp_path, "sleeps")
    assert codes == [75, 75]
    assert (found["behind"], found["wrong"], found["by_rank"]) == ([1], {}, 0)
    places = [(rank["phase"], rank["batch"], rank["step"]) for rank in found["ranks"]]
    assert places == [("forward", 3, 3), ("data", 3, 3)]
    assert "all_reduce" in (tmp_path / "ranks" / "rank-00000.stack.txt").read_text()
    assert "have_fault" in (tmp_path / "ranks" / "rank-00001.stack.txt").read_text()


def test_a_stopped_rank_is_named_by_the_one_that_waits(tmp_path: Path) -> None:
    codes, found = two_ranks(tmp_path, "SIGSTOP")
    assert codes[0] == 75
    assert found["wrong"] == {"1": "stopped"} and "SIGSTOP" in found["text"]


def test_a_killed_rank_is_named_at_once(tmp_path: Path) -> None:
    codes, found = two_ranks(tmp_path, "SIGKILL")
    assert codes == [75, -9]
    assert found["wrong"] == {"1": "gone"} and found["seconds"] < 2


def test_a_ranks_own_error_is_the_exit_code_of_all(tmp_path: Path) -> None:
    """A scheduler that saw a 75 of the other ranks would start the mistake again and again."""
    codes, found = two_ranks(tmp_path, "user error")
    assert codes == [2, 2]
    assert found["wrong"] == {"1": "left"}


def lone_run(folder: str) -> None:
    watchdog = WatchdogCallback(RunDir(Path(folder)), **FAST)
    trainer = SimpleNamespace(global_rank=0, world_size=1, global_step=0)
    watchdog.setup(trainer, None, "fit")
    watchdog.on_train_start(trainer, None)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        time.sleep(0.05)
        watchdog.batch_done()
    time.sleep(60)


def test_a_process_that_was_stopped_itself_is_not_stuck(tmp_path: Path) -> None:
    """Ctrl-Z and fg, a suspended laptop: when it goes on, its own standstill is nobody's fault."""
    process = CONTEXT.Process(target=lone_run, args=(str(tmp_path),))
    process.start()
    while not (tmp_path / "ranks" / "rank-00000.json").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.8)
    assert process.is_alive()
    process.join(20)
    assert process.exitcode == 75, "and a real hang afterwards is found still"
    assert json.loads((tmp_path / "stuck.json").read_text())["behind"] == [0]


def lone_run_on_a_bad_disk(folder: str) -> None:
    watchdog = WatchdogCallback(RunDir(Path(folder)), **FAST)
    trainer = SimpleNamespace(global_rank=0, world_size=1, global_step=0)
    watchdog.setup(trainer, None, "fit")
    (Path(folder) / "ranks").write_text("no folder can be made here")
    watchdog.on_train_start(trainer, None)
    time.sleep(60)


def test_a_stuck_run_leaves_also_where_nothing_can_be_written(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=lone_run_on_a_bad_disk, args=(str(tmp_path),))
    process.start()
    process.join(20)
    code = process.exitcode
    process.kill()
    assert code == 75


def test_the_report_of_a_stuck_run_outlives_its_next_starts(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.ranks.mkdir()
    run.stuck_path.write_text("report")
    (run.ranks / "rank-00000.stack.txt").write_text("stack")
    for _ in range(2):
        WatchdogCallback(run).setup(SimpleNamespace(global_rank=0, world_size=1), None, "fit")
    assert not run.stuck_path.exists() and (tmp_path / "stuck.before.json").read_text() == "report"
    assert (run.ranks / "rank-00000.stack.before.txt").read_text() == "stack"
