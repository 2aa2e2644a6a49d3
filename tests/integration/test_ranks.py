"""A training on two ranks, and in micro-batches, is the training of one process: losses, norms, accuracies."""

from pathlib import Path

import pytest

from blip2train.run_dir import RunDir
from tests.strategy_world import train_on_two_ranks

SMALL = [
    *("trainer.precision=32-true", "trainer.max_steps=3", "optim.warmup_steps=1", "data.num_workers=0"),
    *("data.batch_size=null", "data.global_batch_size=6", "num_threads=1", "log_every_steps=1"),
    *("checkpoint.every_steps=0", "model.qformer.dropout=0"),  # ranks and micro-batches have other masks
]
ON_TWO = ["trainer.accelerator=cpu", "trainer.devices=2"]


def curves(run: RunDir) -> list[dict[str, float]]:
    rows = run.read_metrics()
    return [
        {name: value for name, value in row.items() if name.startswith("train/") or name == "gradient_norm"}
        for row in rows
    ]


def check(whole: RunDir, other: RunDir) -> None:
    assert len(curves(whole)) == 3
    for expected, found in zip(curves(whole), curves(other), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stage_1_on_two_ranks_and_in_micro_batches_is_that_of_one_process(laboratory, tmp_path: Path) -> None:
    base = ["experiment=microworld_stage1", f"paths.data={laboratory.data}", *SMALL]
    one = laboratory.train("microworld_stage1", tmp_path / "one", *SMALL).run
    check(one, laboratory.train("microworld_stage1", tmp_path / "chunks", *SMALL, "stage.micro_batch_size=4").run)
    two = {
        "ddp": ["trainer=ddp", "stage.micro_batch_size=2"],
        "fsdp2": ["trainer=fsdp2", "stage.micro_batch_size=2"],
    }
    runs = train_on_two_ranks(
        tmp_path / "processes", [[*base, *ON_TWO, *more, f"run_dir={tmp_path / name}"] for name, more in two.items()]
    )
    for run in runs:
        check(one, run)


@pytest.mark.slow
def test_stage_2_on_two_ranks_is_that_of_one_process(laboratory, tmp_path: Path) -> None:
    more = [*SMALL, "init_from=scratch"]
    one = laboratory.train("microworld_stage2_opt", tmp_path / "one", *more).run
    base = ["experiment=microworld_stage2_opt", f"paths.data={laboratory.data}", *more]
    (two,) = train_on_two_ranks(
        tmp_path / "processes", [[*base, *ON_TWO, "trainer=ddp", f"run_dir={tmp_path / 'two'}"]]
    )
    check(one, two)
