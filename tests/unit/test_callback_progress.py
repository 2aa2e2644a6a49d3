"""What a person sees of a running training: where it stands, how fast, how long still, and losses beside chance."""

import io
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from blip2train.callback import progress
from blip2train.callback.progress import ProgressCallback, describe_entry

ENTRY = {
    "train/itc_loss": 1.2041, "train/loss": 3.91, "train/itm_accuracy": 0.7, "chance/itc_loss": 2.0794,
    "samples_per_second": 810.4,
}  # fmt: skip


def test_losses_stand_beside_their_chance_levels() -> None:
    assert describe_entry(ENTRY) == "810 samples/s  itc 1.204 (chance 2.079)  loss 3.910"
    assert describe_entry(ENTRY, brief=True) == "810 samples/s  itc 1.20/2.08  loss 3.91"
    assert describe_entry({}) == ""


def test_the_time_left_after_a_resume_is_that_of_the_steps_made_since(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="blip2train")
    clock = iter([1000.0, 1010.0, 1020.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    shown, module = ProgressCallback("stage 1", lambda: ENTRY, every_seconds=15.0), Any
    trainer: Any = SimpleNamespace(global_step=900, max_steps=1000)
    shown.on_train_start(trainer, module)
    trainer.global_step = 905
    shown.on_train_batch_end(trainer, module, {}, None, 0)  # not yet
    trainer.global_step = 910
    shown.on_train_batch_end(trainer, module, {}, None, 1)
    (line,) = caplog.messages
    assert line.startswith("stage 1 910/1000  810 samples/s") and line.endswith("ETA 3:00")  # 90 steps, 2 s each


def test_a_terminal_gets_one_line_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(force_terminal=True, width=100, file=screen)
    monkeypatch.setattr(progress, "Console", lambda **_: terminal)
    names = {f"train/{name}_loss": 1.0 for name in ("itc", "itm", "itg", "one", "more")}
    entry = ENTRY | names | {f"chance/{name.removeprefix('train/')}": 2.0 for name in names}
    shown, module = ProgressCallback("stage 1", lambda: entry), Any
    trainer: Any = SimpleNamespace(global_step=900, max_steps=1000)
    shown.on_train_start(trainer, module)
    trainer.global_step = 1000
    shown.on_train_batch_end(trainer, module, {}, None, 0)
    shown.on_train_end(trainer, module)
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", screen.getvalue()).split("\r")[-1].rstrip()
    assert len(last) <= 100 and "1000/1000" in last and "810 samples/s" in last and last.endswith("…")
