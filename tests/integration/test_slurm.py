"""Trainings under SLURM, on a cluster of scripts: by our batch file and by submitit, stopped, requeued, continued."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_world import Cluster

from blip2train.checkpoint.find import find_checkpoint
from blip2train.run_dir import RunDir, read_json

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("optim.warmup_steps=1", "data.batch_size=4", "data.num_workers=0", "num_threads=1", "log_every_steps=1")
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true")


def training(data: Path, outputs: Path, *overrides: str) -> list[str]:
    return ["experiment=microworld_stage1", f"paths.data={data}", f"paths.outputs={outputs}", *SMALL, *TWO, *overrides]


def submit(cluster: Cluster, arguments: list[str], **variables: str) -> subprocess.Popen[bytes]:
    """Our batch file as slurmd would run it: a copy in the spool, in a session of its own."""
    spooled = cluster.folder / "slurm_script"
    shutil.copy(ROOT / "scripts" / "slurm_train.sbatch", spooled)
    job = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
    job["BLIP2TRAIN_PYTHON"] = sys.executable
    with (cluster.folder / "job.log").open("a") as log:
        return subprocess.Popen(
            ["bash", str(spooled), *arguments],
            cwd=cluster.folder,
            env=cluster.environment | job | variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_requeues_itself_and_goes_on_in_its_folder(laboratory, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    run = RunDir(tmp_path / "out" / "microworld_stage1" / "4242")
    job = submit(cluster, training(laboratory.data, tmp_path / "out", "trainer.max_steps=2000"))
    deadline = time.monotonic() + 150
    while len(run.read_metrics()) < 3 and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    for rank in range(2):  # --signal=USR1: every task, and not the batch shell
        os.kill(int(read_json(run.ranks / f"rank-{rank:05d}.json")["pid"]), signal.SIGUSR1)
    log = cluster.folder / "job.log"
    assert job.wait(90) == 75, log.read_text()
    assert cluster.calls() == ["scontrol requeue 4242"]
    stopped = int(find_checkpoint(run).name.removeprefix("step-"))
    again = submit(
        cluster, training(laboratory.data, tmp_path / "out", "trainer.max_steps=2000"), SLURM_RESTART_COUNT="1"
    )
    deadline = time.monotonic() + 150
    while len(run.read_metrics()) < stopped + 2 and again.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(int(read_json(run.ranks / "rank-00001.json")["pid"]), signal.SIGKILL)  # a node that is lost
    assert again.wait(90) == 137, log.read_text()
    assert cluster.calls() == ["scontrol requeue 4242"] * 2
    assert [row["step"] for row in run.read_metrics()][: stopped + 2] == list(range(1, stopped + 3))


@pytest.mark.parametrize(
    ("code", "state", "restarts", "expected"),
    [
        (75, "RUNNING", "0", ["scontrol requeue 4242"]),
        (75, "CANCELLED", "0", []),
        (75, "COMPLETING", "0", []),
        (75, "RUNNING", "100", []),
        (137, "RUNNING", "0", ["scontrol requeue 4242"]),
        (0, "RUNNING", "0", []),
        (2, "RUNNING", "0", []),
        (130, "RUNNING", "0", []),
    ],
)
def test_only_a_run_that_asks_for_it_is_requeued(tmp_path, code, state, restarts, expected) -> None:
    cluster = Cluster(tmp_path / "cluster")
    (cluster.folder / "srun").write_text(f"#!/bin/bash\nexit {code}\n")
    (cluster.folder / "state").write_text(state)
    job = submit(cluster, [], SLURM_RESTART_COUNT=restarts)
    assert job.wait(10) == code
    assert cluster.calls() == expected


def test_a_preemption_does_not_end_the_batch_shell_before_its_tasks(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    (cluster.folder / "srun").write_text(f"#!/bin/bash\ntouch {tmp_path}/up\nsleep 1\nexit 75\n")
    job = submit(cluster, [])
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(10) == 75
    assert cluster.calls() == ["scontrol requeue 4242"]


def test_the_tasks_get_the_allocations_devices_and_nodes(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    (cluster.folder / "srun").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" "$BLIP2TRAIN_RUN_ID" > {tmp_path}/said\n')
    assert submit(cluster, ["experiment=a b"], SLURM_NTASKS_PER_NODE="8", SLURM_NNODES="4").wait(10) == 0
    said = (tmp_path / "said").read_text().splitlines()
    assert said[:2] == ["--kill-on-bad-exit=0", "--wait=600"]
    assert said[3:6] == ["-m", "blip2train.cli.train", "experiment=a b"]
    assert said[6:] == ["trainer.devices=8", "trainer.num_nodes=4", "4242"]


@pytest.mark.slow
def test_a_sweep_goes_to_slurm_with_one_task_per_device(laboratory, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    arguments = training(laboratory.data, tmp_path / "out", "trainer.max_steps=3", "trainer.devices=2")
    done = subprocess.run(
        [sys.executable, "-m", "blip2train.cli.train", "-m", "launcher=slurm", *arguments],
        cwd=tmp_path,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr + (cluster.folder / "batch.log").read_text()
    batch = (cluster.folder / "batch.sh").read_text().splitlines()
    wanted = ["--ntasks-per-node=2", "--gpus-per-node=2", "--nodes=1", "--signal=USR1@180", "--requeue"]
    assert not {f"#SBATCH {option}" for option in wanted} - set(batch)
    (sweep,) = (tmp_path / "out" / "microworld_stage1").iterdir()
    assert [row["step"] for row in RunDir(sweep / "0").read_metrics()] == [1, 2, 3]
    assert f"export BLIP2TRAIN_RUN_ID={sweep.name.removeprefix('sweep-')}" in batch
    lines = [line for line in batch if line.startswith(("trap", "export"))]
    for code, state, calls in (
        (75, "RUNNING", 1),
        (75, "CANCELLED", 1),
        (2, "RUNNING", 1),
        (137, "RUNNING", 2),
    ):  # its own requeueing
        (cluster.folder / "state").write_text(state)
        (cluster.folder / "short.sh").write_text("\n".join([*lines, f"(exit {code})"]))
        environment = cluster.environment | {"SLURM_JOB_ID": "4242"}
        again = subprocess.run(["bash", str(cluster.folder / "short.sh")], env=environment)
        assert again.returncode == code
        assert cluster.calls().count("scontrol requeue 4242") == calls
