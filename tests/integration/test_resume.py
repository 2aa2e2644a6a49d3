"""A resumed run is the run that was never interrupted: same samples, same losses, same bits."""

import shutil
from pathlib import Path

import pytest

from blip2train.checkpoint.find import find_checkpoint
from blip2train.checkpoint.io import WEIGHTS
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir, read_json


def cut(run: RunDir, keep: str, out: Path) -> RunDir:
    """A copy of a run folder as it was when checkpoint `keep` had just been written."""
    shutil.copytree(run.path, out)
    for folder in (out / "checkpoints").iterdir():
        if folder.name > keep:
            shutil.rmtree(folder)
    return RunDir(out)


def weights(run: RunDir) -> bytes:
    return (find_checkpoint(run) / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("before", "after", "accumulate"), [(0, 0, 1), (2, 2, 1), (0, 2, 2)], ids=["0 workers", "2 workers", "0 to 2, x2"]
)
def test_stage1_resume_is_bit_equal(laboratory, tmp_path: Path, before: int, after: int, accumulate: int) -> None:
    settings = ["checkpoint.every_steps=3", "checkpoint.keep_last=0", "trainer.max_steps=6"]
    settings += [f"trainer.accumulate_grad_batches={accumulate}", "model.qformer.dropout=0.1"]
    whole = laboratory.train("microworld_stage1", tmp_path / "whole", *settings, f"data.num_workers={before}").run
    resumed = cut(whole, "step-0000003", tmp_path / "resumed")
    laboratory.train("microworld_stage1", resumed.path, *settings, f"data.num_workers={after}")
    assert weights(resumed) == weights(whole)
    timing = {"samples_per_second", "tokens_per_second", "step_seconds", "data_wait_fraction", "memory_gb"}
    timing |= {"tflops_per_second"}
    for row, twin in zip(resumed.read_metrics(), whole.read_metrics(), strict=True):
        assert {k: v for k, v in row.items() if k not in timing} == {k: v for k, v in twin.items() if k not in timing}


def test_stage2_resume_is_bit_equal(laboratory, stage1_run: RunDir, tmp_path: Path) -> None:
    settings = [f"init_from={stage1_run.path}", "checkpoint.every_steps=2", "checkpoint.keep_last=0"]
    whole = laboratory.train("microworld_stage2_t5", tmp_path / "whole", *settings).run
    resumed = cut(whole, "step-0000002", tmp_path / "resumed")
    laboratory.train("microworld_stage2_t5", resumed.path, *settings)
    assert weights(resumed) == weights(whole)
    assert str(stage1_run.path) in read_json(resumed.manifest_path)["init"]["sources"]["checkpoint"]
    used = read_json(resumed.manifest_path)["data"]
    laboratory.train("microworld_stage2_t5", resumed.path, *settings)
    assert read_json(resumed.manifest_path)["data"] == used, "asked again, a finished run forgets nothing"


def test_another_setting_on_resume_is_refused_by_name(laboratory, stage1_run: RunDir) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr: \S+ -> 0\.1"):
        laboratory.train("microworld_stage1", stage1_run.path, "optim.lr=0.1")


def test_resume_never_protects_a_finished_run(laboratory, stage1_run: RunDir) -> None:
    with pytest.raises(ConfigError, match="already holds step-0000004"):
        laboratory.train("microworld_stage1", stage1_run.path, "resume=never")
