"""What a run trained on is what `show order` says, also after `kill -9` and a resume in another shape."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blip2train.cli.config import build
from blip2train.cli.show_order import drawn_records
from blip2train.data.mixture import Mixture
from blip2train.run_dir import RunDir, read_jsonl


def trained_on(run: RunDir) -> list[str]:
    """The global sequence of keys, by batch, of a run on one rank."""
    rows = read_jsonl(run.path / "samples-rank0.jsonl")
    assert [row["batch"] for row in rows] == list(range(1, len(rows) + 1)), "no batch is missing, none is there twice"
    return [key for row in rows for key in row["keys"]]


def expected(laboratory, count: int) -> list[str]:
    data = laboratory.compose("microworld_stage1", Path("x")).data
    mixture = Mixture([build(dataset) for dataset in data.datasets.values()], seed=data.seed)
    return [fields[-1] for _, fields in drawn_records(mixture, 0, count - 1)]


def test_training_reads_what_show_order_says(laboratory, tmp_path: Path) -> None:
    run = laboratory.train("microworld_stage1", tmp_path / "run", "callback=sample_log").run
    assert trained_on(run) == expected(laboratory, 32)
    last = run.read_metrics()[-1]
    assert last["data/microworld/samples"] == 32 and last["data/microworld/epochs"] == 0.5


@pytest.mark.slow
def test_a_training_killed_without_warning_goes_on_in_another_shape(laboratory, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    command = [sys.executable, "-m", "blip2train.cli.train", "experiment=microworld_stage1", f"run_dir={run.path}"]
    command += [f"paths.data={laboratory.data}", "callback=sample_log", "optim.warmup_steps=1", "num_threads=1"]
    command += ["checkpoint.every_steps=3", "log_every_steps=1", "trainer.max_steps=40"]
    first = subprocess.Popen([*command, "data.batch_size=8", "data.num_workers=2"], env=os.environ)
    deadline = time.monotonic() + 200
    while not list(run.path.glob("checkpoints/step-*")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # some steps behind the checkpoint, which are lost and come again
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, "killed while it trained"
    subprocess.run([*command, "data.batch_size=16", "data.num_workers=0"], env=os.environ, check=True)
    keys = trained_on(run)
    assert len(keys) > 40 * 8
    assert keys == expected(laboratory, len(keys))
