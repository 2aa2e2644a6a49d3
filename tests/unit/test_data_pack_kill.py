"""Packing that is killed, at any moment, ends as packing that is not."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pack_world import SETTINGS, ListSource, contents, write_images

from blip2train.data.pack import pack

COUNT = 200
PROGRAM = Path(__file__).with_name("pack_world.py")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Images, and the folder that an undisturbed call makes of them."""
    pack(ListSource(write_images(tmp_path / "images", COUNT)), tmp_path / "whole", SETTINGS)
    return tmp_path


def start(world: Path, workers: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), str(world / "images"), str(world / "out"), str(COUNT), str(workers)]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


def finish(world: Path) -> None:
    pack(ListSource(write_images(world / "images", COUNT)), world / "out", SETTINGS)
    assert contents(world / "out") == contents(world / "whole")


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def num_shards(world: Path) -> int:
    return len(list((world / "out").glob("*.tar")))


def processes_of(session: int) -> list[str]:
    """What still runs of a program started as its own session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        state, _, group = rest.split()[:3]
        if int(group) == session and state != "Z":
            found.append(name)
    return found


def test_a_killed_call_is_continued(world: Path) -> None:
    program = start(world, workers=1)
    wait_until(lambda: num_shards(world) >= 10)
    program.kill()
    program.wait()
    assert not (world / "out" / "manifest.json").exists()
    assert all(path.read_bytes() == (world / "whole" / path.name).read_bytes() for path in world.glob("out/*.tar"))
    finish(world)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_many_processes_killed_at_many_moments(world: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(2):
        before, program = num_shards(world), start(world, workers=2)
        goal = before + rng.randrange(1, 12)
        wait_until(lambda: num_shards(world) >= goal or program.poll() is not None)  # noqa: B023
        time.sleep(rng.random() * 0.02)
        program.kill()
        program.wait()
        wait_until(lambda: not processes_of(program.pid), 20)  # noqa: B023
    finish(world)


@pytest.mark.slow
def test_ctrl_c_leaves_whole_shards_and_no_process(world: Path) -> None:
    program = start(world, workers=2)
    wait_until(lambda: num_shards(world) >= 5)
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does: every process gets it
    assert program.wait(20) != 0
    wait_until(lambda: not processes_of(program.pid), 20)
    assert not list((world / "out").rglob("*.partial")) and not (world / "out" / "manifest.json").exists()
    finish(world)


@pytest.mark.slow
def test_a_killed_worker_is_said(world: Path) -> None:
    program = start(world, workers=2)
    wait_until(lambda: num_shards(world) >= 3)
    for child in _grandchildren(program.pid):
        os.kill(child, signal.SIGKILL)
    _, errors = program.communicate(timeout=60)
    assert program.returncode != 0 and "a worker process was killed" in errors
    finish(world)


def _grandchildren(pid: int) -> list[int]:
    """The workers: children of the fork server, which is a child of the program."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return [child for child, parent in parents.items() if parents.get(parent) == pid]
