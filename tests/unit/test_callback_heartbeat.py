"""From the heartbeats of all ranks: who keeps the others waiting, and what became of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blip2train.callback.heartbeat import (
    Heartbeat,
    Watch,
    heartbeat_path,
    process_state,
    read_heartbeat,
    report,
    write_heartbeat,
)


def beat(rank: int, batch: int = 7, phase: str = "backward", **more) -> Heartbeat:
    known = {"host": f"node{rank}", "pid": 100 + rank, "beat": 1, "step": batch, "phase_seconds": 3.0}
    return Heartbeat(rank=rank, batch=batch, phase=phase, **(known | more))


def test_the_rank_that_is_still_at_its_data_is_behind() -> None:
    found = report([beat(0), beat(1, phase="data"), beat(2)], {}, by_rank=0, seconds=900)
    assert found["behind"] == [1]
    assert "rank 1 on node1 (pid 101): behind; data of batch 8, step 7, for 3 s" in found["text"]
    assert "rank 0 on node0 (pid 100): waits; backward of batch 8" in found["text"]


def test_a_rank_one_batch_back_is_behind_whatever_its_phase() -> None:
    assert report([beat(0, 8, "forward"), beat(1, 7, "after the step")], {}, by_rank=0, seconds=1)["behind"] == [1]


def test_where_all_are_at_the_same_place_nobody_is_blamed() -> None:
    found = report([beat(0), beat(1)], {}, by_rank=0, seconds=900)
    assert found["behind"] == [] and "interconnect" in found["text"]


def test_a_single_process_that_waits_for_data_is_itself_to_blame() -> None:
    assert report([beat(0, phase="data")], {}, by_rank=0, seconds=900)["behind"] == [0]


def test_a_lost_rank_is_blamed_alone_though_it_is_ahead_of_others() -> None:
    found = report([beat(0, phase="forward"), beat(1), beat(2, phase="forward")], {1: "gone"}, by_rank=0, seconds=30)
    assert found["behind"] == [] and found["wrong"] == {"1": "gone"}
    assert "rank 1 keeps the others waiting: its process is gone" in found["text"]


def test_a_heartbeat_survives_the_file_and_rubbish_is_no_heartbeat(tmp_path: Path) -> None:
    write_heartbeat(tmp_path, beat(3))
    assert read_heartbeat(tmp_path, 3) == beat(3)
    assert read_heartbeat(tmp_path, 4) is None
    for rubbish in ("", "{", "[]", '{"rank": 3}', "null"):
        heartbeat_path(tmp_path, 3).write_text(rubbish)
        assert read_heartbeat(tmp_path, 3) is None


def test_a_silent_rank_is_one_whose_file_has_not_changed_by_the_readers_clock(tmp_path: Path) -> None:
    watch = Watch(tmp_path, 3, "here", silent_after=10)
    for rank in (0, 1):
        write_heartbeat(tmp_path, beat(rank, beat=1))
    assert watch.look(100) == {}
    write_heartbeat(tmp_path, beat(0, beat=2))
    assert watch.look(105) == {}
    assert watch.look(111) == {1: "silent", 2: "never started"}
    assert watch.look(116) == {0: "silent", 1: "silent", 2: "never started"}
    write_heartbeat(tmp_path, beat(1, beat=2))
    assert watch.look(117) == {0: "silent", 2: "never started"}


@pytest.mark.parametrize(("left", "state", "code"), [(2, "left", 2), (1, "left", 1), (75, "left", 75), (0, None, 75)])
def test_a_rank_that_ended_by_itself_passes_its_error_on(tmp_path: Path, left, state, code) -> None:
    watch = Watch(tmp_path, 1, "here", silent_after=10)
    write_heartbeat(tmp_path, beat(0, left=left, reason="DataError: no such shard"))
    assert watch.look(0).get(0) == state
    assert watch.exit_code() == code


def test_a_process_of_this_machine_is_seen_to_stop_and_to_end(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    write_heartbeat(tmp_path, beat(0, host="here", pid=process.pid))
    watch = Watch(tmp_path, 1, "here", silent_after=10)
    try:
        assert process_state(process.pid) == "runs" and watch.look(0) == {}
        os.kill(process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while process_state(process.pid) != "stopped" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert watch.look(5) == {}, "it may go on at any moment"
        assert watch.look(11) == {0: "stopped"}
    finally:
        process.kill()
    while process_state(process.pid) != "gone" and time.monotonic() < deadline + 5:
        time.sleep(0.01)
    assert watch.look(12) == {0: "gone"}, "a zombie is gone, too"
    process.wait()
    assert process_state(process.pid) == "gone"
