"""Two ranks that are killed again and again finish with the weights of a run that was left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blip2train.run_dir import read_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DRIVER = Path(__file__).resolve().parents[2] / "scripts" / "chaos.py"
SETTINGS = (
    *("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"),
    *("trainer.max_steps=80", "optim.warmup_steps=1", "data.batch_size=2", "data.num_workers=0", "num_threads=1"),
    *("log_every_steps=1", "checkpoint.every_steps=2"),
)
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else no restart of torchrun succeeds
}
LAUNCHERS = {
    "built in": ("blip2train.cli.main", "train"),
    "torchrun": (
        *("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"),
        *("-m", "blip2train.cli.train"),
    ),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_ranks_cost_no_bit_of_the_weights(laboratory, tmp_path: Path, launcher: str) -> None:
    result = tmp_path / "chaos.json"
    driver = [sys.executable, str(DRIVER), "--kills", "3", "--work", str(tmp_path / "work"), "--result", str(result)]
    training = [sys.executable, "-m", *LAUNCHERS[launcher], "experiment=microworld_stage1"]
    training += [f"paths.data={laboratory.data}", *SETTINGS]
    done = subprocess.run([*driver, "--", *training], env=ENVIRONMENT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_json(result)
    assert found["equal"] and found["same_losses"] and found["steps"] == 80
    assert len(found["kills"]) == 3 and any(kill["writing_checkpoint"] for kill in found["kills"])
    assert not any(kill["others_killed"] for kill in found["kills"]), "a rank that is left alone ends by itself"
