"""The commands as a user types them, in processes of their own. Slow: each pays for importing torch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blip2train.checkpoint.find import find_checkpoint
from blip2train.checkpoint.io import WEIGHTS
from blip2train.run_dir import RunDir, read_json

pytestmark = pytest.mark.slow

SMALL = ("optim.warmup_steps=1", "data.batch_size=8", "data.num_workers=0", "num_threads=1", "log_every_steps=1")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "blip2train.cli.main", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=280)
    assert process.returncode == code, output
    return output


def training(laboratory, run: Path, *overrides: str) -> list[str]:
    own = ["train", "experiment=microworld_stage1", f"paths.data={laboratory.data}", f"run_dir={run}"]
    return [*own, *SMALL, *overrides]


def test_two_gloo_processes_train_one_run_and_match_one_process(laboratory, tmp_path: Path) -> None:
    """The dispatcher survives Lightning's relaunch; the first contrastive loss is that of the whole batch."""
    two = ["trainer.devices=2", "+trainer.strategy=ddp_find_unused_parameters_true", "trainer.max_steps=3"]
    finish(start(*training(laboratory, tmp_path / "two", *two), cwd=tmp_path))
    run = RunDir(tmp_path / "two")
    rows = run.read_metrics()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert find_checkpoint(run).name == "step-0000003"
    # ln 16 is the level of an untrained model over 2 x 8 pairs; over 8 pairs it would be ln 8
    assert rows[0]["train/itc_loss"] == pytest.approx(2.77, abs=0.35)
    manifest = read_json(run.manifest_path)
    assert manifest["chance_levels"]["train/itc_loss"] == pytest.approx(2.7726, abs=1e-3)
    assert "ddp_process" not in manifest["command"]  # the user's command, not the one that relaunched rank 1


def test_an_interrupt_writes_a_checkpoint_and_the_same_command_continues_bit_equal(laboratory, tmp_path: Path) -> None:
    steps = ("trainer.max_steps=40",)
    whole = training(laboratory, tmp_path / "whole", *steps)
    finish(start(*whole, cwd=tmp_path))
    command = training(laboratory, tmp_path / "cut", *steps)
    process = start(*command, cwd=tmp_path)
    run = RunDir(tmp_path / "cut")
    deadline = time.monotonic() + 120
    while len(run.read_metrics()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    finish(process, code=130)
    stopped = int(find_checkpoint(run).name.removeprefix("step-"))
    assert 3 <= stopped < 40
    assert read_json(run.manifest_path)["stopped_by"] == "SIGINT"
    assert "resuming" in finish(start(*command, cwd=tmp_path))
    twin = RunDir(tmp_path / "whole")
    assert (find_checkpoint(run) / WEIGHTS).read_bytes() == (find_checkpoint(twin) / WEIGHTS).read_bytes()
    assert [row["step"] for row in run.read_metrics()] == list(range(1, 41))


def test_a_sweep_writes_one_run_per_job(laboratory, tmp_path: Path) -> None:
    command = training(laboratory, tmp_path / "unused", "trainer.max_steps=2", f"paths.outputs={tmp_path}", "seed=1,2")
    finish(start("train", "-m", *command[1:], cwd=tmp_path))
    runs = sorted(path.parent for path in tmp_path.glob("microworld_stage1/sweep-*/*/config.yaml"))
    assert [run.name for run in runs] == ["0", "1"]
    assert [read_json(run / "manifest.json")["seed"] for run in runs] == [1, 2]
    assert all((run / "metrics.csv").is_file() for run in runs) and not (tmp_path / "unused").exists()


@pytest.mark.parametrize("what", ["batch", "masks", "params", "estimate", "config", "paper-diff"])
def test_show_prints_and_draws(laboratory, tmp_path: Path, what: str) -> None:
    overrides = ("experiment=microworld_stage1", f"paths.data={laboratory.data}")
    output = finish(start("show", what, *overrides, cwd=tmp_path))
    expected = {"batch": "input_ids", "masks": "multimodal causal", "params": "qformer", "config": "_target_"}
    expected |= {"estimate": "per device", "paper-diff": "differs from the paper"}
    assert expected[what] in output
    pictures = {"batch": ["show_batch.png"], "masks": ["show_masks.png"]}.get(what, [])
    assert [path.name for path in tmp_path.iterdir()] == pictures
