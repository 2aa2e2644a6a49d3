"""`blip2train doctor` as a user types it: a machine in order, and one fault at a time. Each imports torch twice."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SMALL = ("data.batch_size=8", "data.num_workers=0", "num_threads=1", "steps=2")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")


def doctor(
    laboratory, folder: Path, *overrides: str, launcher: tuple[str, ...] = (), code: int = 0, file_bytes: int = -1
) -> dict[str, Any]:
    """Rows by check (`rows`), the rest of the JSON result, and the output; nothing may be left in the folder.

    Args:
        laboratory: has the data.
        folder: of the run.
        overrides: further ones.
        launcher: stands before the module.
        code: wanted exit code.
        file_bytes: longest file that may be written, as on a full disk; -1 for any.
    """
    out = folder / "result.json"
    own = ["experiment=microworld_stage1", f"paths.data={laboratory.data}", f"run_dir={folder / 'run'}", f"out={out}"]
    command = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), "blip2train.cli.doctor", *own, *SMALL]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))

    done = subprocess.run(
        [*command, *overrides], capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, preexec_fn=limit
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert {path.name for path in folder.iterdir()} <= {"result.json", "run"}
    result: dict[str, Any] = json.loads(out.read_text())
    by_check: dict[str, list[dict[str, str]]] = {}
    for row in result["rows"]:
        by_check.setdefault(row["check"], []).append(row)
    return result | {"rows": by_check, "output": done.stdout}


def status(rows: list[dict[str, str]]) -> set[str]:
    return {row["status"] for row in rows}


def test_a_laptop_in_order_has_nothing_but_ok_and_warnings(laboratory, tmp_path: Path) -> None:
    result = doctor(laboratory, tmp_path)
    assert result["result"] in {"ok", "warn"} and "failed" not in result["output"]
    assert set().union(*map(status, result["rows"].values())) <= {"ok", "warn"}
    assert len(result["rows"]) == 10 and "what to do" in result["output"]
    step = result["facts"]["step"]
    assert len(step["step_seconds"]) == 2 and step["samples_per_step"] == 8 and step["world_size"] == 1
    assert "600 steps take about" in result["rows"]["time"][0]["measured"]


def test_a_run_that_goes_on_is_tried_from_its_checkpoint_and_left_as_it_is(laboratory, tmp_path: Path) -> None:
    folder, same = tmp_path / "run", ("optim.warmup_steps=1", "log_every_steps=1", "trainer.max_steps=9")
    laboratory.train("microworld_stage1", folder, "trainer.max_steps=9", "checkpoint.every_steps=4")
    finished = doctor(laboratory, tmp_path, *same, "only=[step]", code=2)
    assert "the run is finished" in finished["rows"]["config"][1]["measured"]
    shutil.rmtree(folder / "checkpoints" / "step-0000009")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    unfinished = doctor(laboratory, tmp_path, *same, "only=[step,time]")
    assert "step-0000008" in unfinished["rows"]["config"][1]["measured"]
    assert status(unfinished["rows"]["step"]) == {"ok"} and "1 steps take" in unfinished["rows"]["time"][0]["measured"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_two_processes_of_the_own_launcher_are_measured_together(laboratory, tmp_path: Path) -> None:
    result = doctor(laboratory, tmp_path, *TWO, "only=[step,interconnect]")
    assert result["facts"]["step"]["world_size"] == 2 and result["facts"]["step"]["samples_per_step"] == 16
    assert status(result["rows"]["step"]) == {"ok"}
    assert result["rows"]["interconnect"][0]["measured"].startswith("2 processes:")


def test_under_torchrun_every_process_takes_part_and_one_speaks(laboratory, tmp_path: Path) -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    result = doctor(laboratory, tmp_path, *TWO, "only=[devices,step,interconnect]", launcher=launcher)
    assert "2 processes started" in result["rows"]["devices"][0]["measured"]
    assert result["facts"]["step"]["world_size"] == 2 and status(result["rows"]["step"]) == {"ok"}
    assert result["rows"]["interconnect"][0]["measured"].startswith("2 processes:")
    assert result["output"].count("what to do") == 1


def test_missing_shards_and_weights_are_named_and_no_step_is_tried(laboratory, tmp_path: Path) -> None:
    gone = ("paths.data=/nowhere", "model.vision_encoder.weights=/nowhere/vit.safetensors")
    result = doctor(laboratory, tmp_path, *gone, code=2)
    assert "/nowhere/microworld" in result["rows"]["shards"][0]["measured"]
    assert "/nowhere/vit.safetensors" in result["rows"]["weights"][0]["measured"]
    assert "shards, weights" in result["rows"]["step"][0]["measured"] and status(result["rows"]["step"]) == {"skip"}


def test_a_full_disk_fails_before_a_step_is_tried(laboratory, tmp_path: Path) -> None:
    result = doctor(laboratory, tmp_path, "only=[disk,step]", code=2, file_bytes=1 << 20)
    failed = [row for row in result["rows"]["disk"] if row["status"] == "fail"]
    assert len(failed) == 1 and "File too large" in failed[0]["measured"]
    assert status(result["rows"]["step"]) == {"skip"}


def test_more_devices_than_there_are_fail(laboratory, tmp_path: Path) -> None:
    result = doctor(laboratory, tmp_path, "trainer=gpu", "trainer.devices=64", "skip=[shards]", code=2)
    assert any("64 GPUs asked for" in row["measured"] for row in result["rows"]["devices"])
    assert status(result["rows"]["step"]) == status(result["rows"]["interconnect"]) == {"skip"}


def test_a_training_that_crashes_is_a_row(laboratory, tmp_path: Path) -> None:
    result = doctor(laboratory, tmp_path, "optim.lr=-1", "only=[step,time]", code=2)
    (row,) = result["rows"]["step"]
    assert row["status"] == "fail" and "-1" in row["measured"]
    assert status(result["rows"]["time"]) == {"skip"}
