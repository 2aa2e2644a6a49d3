"""Both stages on a CUDA device; run by scripts/gpu_check.sh, since no other machine can."""

from pathlib import Path

import pytest
import torch

from blip2train.cli.config import compose
from blip2train.cli.evaluate import evaluate
from blip2train.objective.draw import Draw
from blip2train.run_dir import RunDir

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_both_stages_train_and_are_evaluated_on_the_device(laboratory, tmp_path: Path, precision: str) -> None:
    overrides = ["trainer=gpu", "trainer.max_steps=20", f"trainer.precision={precision}"]
    first = laboratory.train("microworld_stage1", tmp_path / "first", *overrides).run
    start = f"init_from={first.path}"
    second = laboratory.train("microworld_stage2_opt", tmp_path / "second", start, *overrides).run
    for run in (first, second):
        losses = [row["train/loss"] for row in run.read_metrics()]
        assert losses[-1] < losses[0]
        chosen = [f"run={run.path}", f"paths.data={laboratory.data}", "device=cuda"]
        assert evaluate(compose("evaluate", chosen), run)


def test_a_resumed_run_repeats_the_losses_of_the_whole_one(laboratory, tmp_path: Path) -> None:
    """To rounding only: CUDA kernels add in an order of their own."""
    overrides = ["trainer=gpu", "trainer.precision=32-true", "checkpoint.every_steps=3", "trainer.max_steps=6"]
    whole = laboratory.train("microworld_stage1", tmp_path / "whole", *overrides).run
    cut = RunDir(tmp_path / "cut")
    whole.path.rename(cut.path)
    before = cut.read_metrics()
    for folder in cut.checkpoints.glob("step-0000006"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    laboratory.train("microworld_stage1", cut.path, *overrides)
    after = [row["train/loss"] for row in cut.read_metrics()]
    assert after == pytest.approx([row["train/loss"] for row in before], rel=1e-3)
    assert torch.cuda.max_memory_allocated() > 0


def test_the_device_draws_the_negatives_of_the_cpu() -> None:
    pairs = torch.randint(-(2**62), 2**62, (300,), generator=torch.Generator().manual_seed(0))
    here, there = (Draw(1, 2).uniform(0, ids[:, None], ids[None, :]) for ids in (pairs, pairs.cuda()))
    assert torch.equal(here, there.cpu())
