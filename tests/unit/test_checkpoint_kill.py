"""A writer that is killed, between any two calls to the system or at any moment, leaves a checkpoint to go on from."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blip2train.callback.checkpoint import CheckpointCallback
from blip2train.checkpoint.find import find_checkpoint, list_checkpoints
from blip2train.checkpoint.io import TRAINER_STATE, WEIGHTS, read_metadata, read_weights
from blip2train.checkpoint.publish import clear_leftovers, partial_of
from blip2train.run_dir import RunDir


def write(run: RunDir, step: int, size: int = 1000) -> None:
    """What the main rank does for one checkpoint, the older one's end included."""
    callback = CheckpointCallback(run, every_steps=1, keep_last=1)
    final = run.checkpoints / f"step-{step:07d}"
    clear_leftovers(run.checkpoints)
    callback._file.save_checkpoint({"moment": torch.full((size,), float(step))}, partial_of(final) / TRAINER_STATE)
    assert callback._write(final, {"weight": torch.full((size,), float(step))}, {"step": step}) is None


def child_that(act: Callable[[], None]) -> int:
    """Runs `act` in a process of its own; returns its number."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(1)  # no part of pytest's own end
    return child


def check(run: RunDir) -> int:
    """The step of the checkpoint that a start would take; it is whole, and its two files are of that step."""
    found = find_checkpoint(run, files=None)
    step = int(read_metadata(found)["step"])
    assert read_weights(found / WEIGHTS)["weight"].unique().tolist() == [step]
    assert torch.load(found / TRAINER_STATE, weights_only=True)["moment"].unique().tolist() == [step]
    return step


def killed_before_call(run: RunDir, number: int, step: int) -> bool:
    """Write, and die before the call to the system of this number; False where there are fewer."""

    def act() -> None:
        calls = 0

        def count(event: str, args: tuple[object, ...]) -> None:
            nonlocal calls
            if event == "open" or event.startswith(("os.", "shutil.", "pathlib.")):
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        write(run, step)
        os._exit(0)

    status = os.waitpid(child_that(act), 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize(
    ("again", "stride"),
    [
        pytest.param(False, 5, id="a new one, every fifth call"),
        pytest.param(False, 1, id="a new one", marks=pytest.mark.slow),
        pytest.param(True, 1, id="one that is there", marks=pytest.mark.slow),
    ],
)
def test_a_kill_before_any_call_leaves_a_whole_checkpoint(tmp_path: Path, again: bool, stride: int) -> None:
    number, seen = 1, set()
    while True:
        run = RunDir(tmp_path / str(number))
        write(run, 1)
        if again:  # as after a damaged one: the older stays until the new one has its name
            torn = run.checkpoints / "step-0000002"
            torn.mkdir()
            (torn / WEIGHTS).write_bytes(b"torn")
        if not killed_before_call(run, number, 2):
            break
        seen.add(check(run))
        write(run, 2)
        assert check(run) == 2
        assert [path.name for path in run.checkpoints.iterdir()] == ["step-0000002"], "nothing is left lying about"
        number += stride
    assert seen == {1, 2} and number > 20, "kills came before and after the checkpoint had its name"


def test_kills_at_random_moments_never_cost_more_than_the_one_being_written(tmp_path: Path) -> None:
    run, rng = RunDir(tmp_path), random.Random(0)
    write(run, 1)
    begin = time.monotonic()
    write(run, 2, size=20_000)
    seconds = time.monotonic() - begin

    def write_on() -> None:
        for step in range(check(run) + 1, 1_000_000):
            write(run, step, size=20_000)

    before = 2
    for kills in range(200):
        if kills >= 8 and before > 2:  # a slow machine gets further between two kills only later
            break
        child = child_that(write_on)
        time.sleep(rng.uniform(0.0, 5 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        after = check(run)
        assert after >= before and len(list_checkpoints(run)) <= 2
        before = after
    assert before > 2, "some were written between the kills"
