"""How a run of two processes ends, by each launcher: signalled, killed, stopped or hung, and with which exit code."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from blip2train.checkpoint.find import find_checkpoint
from blip2train.run_dir import RunDir, read_json

pytestmark = pytest.mark.slow

SMALL = ("optim.warmup_steps=1", "data.batch_size=4", "data.num_workers=0", "num_threads=1", "log_every_steps=1")
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_steps=5000")
QUICK = ("watchdog.heartbeat_seconds=0.3", "watchdog.stuck_minutes=0.5")
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else no restart of torchrun succeeds
}
MODULE = ("-m", "blip2train.cli.train")
LIGHTNING = (sys.executable, *MODULE)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *MODULE)


class Run:
    """One training of two ranks, in a session of its own: a terminal's Ctrl-C reaches all of it, and nothing else."""

    def __init__(self, folder: Path, data: Path, launch: tuple[str, ...], *overrides: str) -> None:
        self.dir = RunDir(folder)
        own = ["experiment=microworld_stage1", f"paths.data={data}", f"run_dir={folder}", *SMALL, *TWO, *overrides]
        self.log = folder.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*launch, *own],
                cwd=folder.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
                start_new_session=True,
            )

    def wait_for_steps(self, number: int = 3) -> None:
        deadline = time.monotonic() + 400
        while len(self.dir.read_metrics()) < number:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def pid(self, rank: int) -> int:
        return int(read_json(self.dir.ranks / f"rank-{rank:05d}.json")["pid"])

    def ends(self, within: float) -> int:
        """The exit code; fails where processes are left behind."""
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {within} s:\n{self.log.read_text()}")
        deadline = time.monotonic() + 40
        while self.left_behind() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.left_behind()
        return code

    def left_behind(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        if self.left_behind():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def started(laboratory, tmp_path: Path) -> Iterator:
    runs: list[Run] = []

    def begin(launch: tuple[str, ...], *overrides: str) -> Run:
        devices = "trainer.devices=1" if "--nnodes=2" in launch else "trainer.devices=2"
        runs.append(Run(tmp_path / "run", laboratory.data, launch, devices, *overrides))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def saved_step(run: Run) -> int:
    return int(find_checkpoint(run.dir).name.removeprefix("step-"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_preempted_rank_takes_all_along_with_a_checkpoint_and_the_requeue_code(started, number: int) -> None:
    run = started(LIGHTNING)
    run.wait_for_steps()
    os.kill(run.pid(1), number)
    assert run.ends(within=60) == 75
    rows = run.dir.read_metrics()
    assert saved_step(run) == rows[-1]["step"] == len(rows) < 5000


def test_ctrl_c_once_saves_and_twice_leaves_at_once(started) -> None:
    run = started(LIGHTNING, "data.num_workers=1")
    run.wait_for_steps()
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does: ranks and loader workers alike
    assert run.ends(within=60) == 130
    first = saved_step(run)
    assert "Traceback" not in run.log.read_text()
    again = started(LIGHTNING)
    again.wait_for_steps(first + 3)
    os.kill(again.pid(1), signal.SIGSTOP)  # rank 0 hangs inside a collective now
    os.kill(again.pid(0), signal.SIGINT)
    time.sleep(1.5)
    os.kill(again.pid(0), signal.SIGINT)
    time.sleep(1)
    os.kill(again.pid(1), signal.SIGCONT)
    assert again.ends(within=40) == 130
    assert saved_step(again) >= first


def test_torchrun_passes_a_preemption_on_and_its_workers_save(started) -> None:
    run = started(TORCHRUN, "data.num_workers=1")
    run.wait_for_steps()
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.ends(within=60) != 0  # torchrun has a code of its own
    assert saved_step(run) == run.dir.read_metrics()[-1]["step"]
    assert read_json(run.dir.manifest_path)["stopped_by"] == "SIGTERM"


def test_a_single_ctrl_c_under_torchrun_which_workers_get_twice_still_saves(started) -> None:
    run = started(TORCHRUN)
    run.wait_for_steps()
    os.killpg(run.process.pid, signal.SIGINT)
    run.ends(within=60)
    assert saved_step(run) == run.dir.read_metrics()[-1]["step"]
    assert read_json(run.dir.manifest_path)["stopped_by"] == "SIGINT"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_the_run_leaves_to_be_requeued(started, rank: int) -> None:
    run = started(LIGHTNING, *QUICK)
    run.wait_for_steps()
    pid = run.pid(rank)
    os.kill(pid, signal.SIGKILL)
    code = run.ends(within=60)
    if rank == 1:  # killed itself, the main process says nothing more
        assert code == 75
    found = read_json(run.dir.stuck_path)
    assert found["wrong"] == {str(rank): "gone"} and f"pid {pid}" in found["text"]


class FailsOnRankOne(pl.Callback):
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_one_ranks_own_error_is_the_exit_code_of_the_run(started) -> None:
    run = started(LIGHTNING, "+callback.fails._target_=test_two_process_ends.FailsOnRankOne", *QUICK)
    assert run.ends(within=250) == 2
    said = run.log.read_text()
    assert "out of memory in backward of batch 3 (step 2)" in said and "stage.micro_batch_size=2" in said
    assert read_json(run.dir.stuck_path)["wrong"] == {"1": "left"}


def test_a_rank_alone_before_training_does_not_wait_for_one_that_was_told_to_leave(started) -> None:
    run = started(LIGHTNING)
    deadline = time.monotonic() + 100
    while "global batch" not in run.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    run.process.send_signal(signal.SIGTERM)
    assert run.ends(within=60) == 75


def test_torchrun_starts_again_after_a_lost_rank_and_the_run_goes_on(started) -> None:
    again = list(TORCHRUN)
    again.insert(again.index("--standalone"), "--max-restarts=1")
    run = started(tuple(again), "trainer.max_steps=40", "checkpoint.every_steps=5", *QUICK)
    run.wait_for_steps(12)
    os.kill(run.pid(1), signal.SIGKILL)
    assert run.ends(within=120) == 0
    assert saved_step(run) == 40 and len(run.dir.read_metrics()) == 40
    assert "resuming" in run.log.read_text()


def test_a_stopped_rank_is_named_and_the_others_leave(started) -> None:
    run = started(LIGHTNING, *QUICK)
    run.wait_for_steps()
    stopped = run.pid(1)
    os.kill(stopped, signal.SIGSTOP)
    assert run.process.wait(90) == 75
    os.kill(stopped, signal.SIGCONT)
    assert run.ends(within=20) == 75
    found = read_json(run.dir.stuck_path)
    assert found["wrong"] == {"1": "stopped"}
    assert "all_reduce" in (run.dir.ranks / "rank-00000.stack.txt").read_text() or found["by_rank"] == 0


def test_two_nodes_of_torchrun_share_a_run_folder_named_by_their_rendezvous(laboratory, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = []
    for _ in range(2):
        launch = (sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1")
        launch += ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=night7", *MODULE)
        own = ["experiment=microworld_stage1", f"paths.data={laboratory.data}", f"paths.outputs={tmp_path}/out"]
        own += [*SMALL, *TWO, "trainer.devices=1", "trainer.num_nodes=2", "trainer.max_steps=3"]
        with (tmp_path / f"node{len(nodes)}.log").open("w") as log:
            nodes.append(subprocess.Popen([*launch, *own], cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log))
    assert [node.wait(200) for node in nodes] == [0, 0], (tmp_path / "node0.log").read_text()
    (folder,) = (tmp_path / "out" / "microworld_stage1").iterdir()
    assert folder.name == "night7"
    assert [row["step"] for row in RunDir(folder).read_metrics()] == [1, 2, 3]
