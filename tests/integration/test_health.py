"""The guards of a training, as the command line puts them together: warnings, skipped steps and what a run keeps."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import Laboratory

from blip2train.batch_file import load_batch
from blip2train.callback.finite import NonFiniteError
from blip2train.cli.config import compose
from blip2train.cli.show import show_batch
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir, read_json


class SameQueries(pl.Callback):
    """All queries start alike, and stay so."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        queries = pl_module.model.qformer.query_tokens.data
        queries.copy_(queries[..., :1, :].expand_as(queries).clone())


class BreakBlock(pl.Callback):
    """From batch `first` to `last` on, a block of the Q-Former answers NaN for one image."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def spoil(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            if self.first <= trainer.fit_loop.total_batch_idx <= self.last:
                output = output.clone()
                output[1] = torch.nan
            return output

        pl_module.model.ln_vision.register_forward_hook(spoil)


def callback(name: str, **arguments: Any) -> list[str]:
    own = f"+callback.{name}"
    return [f"{own}._target_={__name__}.{name}", *(f"{own}.{key}={value}" for key, value in arguments.items())]


def causes(run: RunDir) -> set[str]:
    return {row["cause"] for row in run.read_warnings()}


def test_a_model_that_does_not_learn_is_told_loss_by_loss(laboratory: Laboratory, tmp_path: Path) -> None:
    still = ["optim.lr=1e-12", "optim.min_lr=0", "health.settle_steps=5", "health.weights_every_steps=1"]
    wrong = ["model.temperature=0.0005", "data.batch_size=4", *callback("SameQueries")]
    outcome = laboratory.train("microworld_stage1", tmp_path / "run", "trainer.max_steps=5", *still, *wrong)
    assert causes(outcome.run) == {
        "itc_at_chance",
        "itm_at_chance",
        "itg_at_chance",
        "query_collapse",
        "temperature_at_clamp",
        "trainable_weight_still",
    }
    rows = {row["cause"]: row for row in outcome.run.read_warnings()}
    assert "1.3863" in rows["itc_at_chance"]["seen"] and "0.6365" in rows["itm_at_chance"]["seen"]
    assert "qformer.query_tokens" not in rows["trainable_weight_still"]["parameters"]  # moved by the callback


def test_stage_2_is_judged_too(laboratory: Laboratory, tmp_path: Path) -> None:
    still = ["optim.lr=1e-12", "optim.min_lr=0", "health.settle_steps=5", "init_from=scratch"]
    still += ["health.weights_every_steps=0", "data.batch_size=4"]
    wrong = ["llm.model.path_or_config=${llm.architecture}"]
    outcome = laboratory.train("microworld_stage2_opt", tmp_path / "run", "trainer.max_steps=5", *still, *wrong)
    assert causes(outcome.run) == {"lm_at_chance"}


def test_a_bad_batch_is_left_out_named_kept_and_shown(
    laboratory: Laboratory, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [*callback("BreakBlock", first=2, last=2), "data.batch_size=4"]
    run = laboratory.train("microworld_stage1", tmp_path / "run", "trainer.max_steps=4", *wrong).run
    assert [row.get("skipped_steps") for row in run.read_metrics()] == [0, 0, 1, 1]
    assert "train/loss" not in run.read_metrics()[2] and "gradient_norm" not in run.read_metrics()[2]
    assert causes(run) == {"step_left_out"}
    folder = run.bad_steps / "step-0000003"
    report = read_json(folder / "report.json")
    batch, _ = load_batch(folder / "batch-rank0.pt")
    where = "ln_vision (LayerNorm) gave NaN on rank 0, from a finite input"
    assert report["found"] == f"{where}; in 1 of 4 rows, keys {batch.keys[1]}"
    assert report["temperature"] > 0.05 and report["ranks"][0]["losses"]["train/itg_loss"] == "nan"
    monkeypatch.chdir(tmp_path)
    show_batch(compose("show_batch", [f"batch={folder / 'batch-rank0.pt'}"]))
    shown = capsys.readouterr().out
    assert batch.keys[0] in shown and (tmp_path / "show_batch.png").is_file()


def test_a_run_that_stays_bad_ends_and_its_last_checkpoint_resumes(laboratory: Laboratory, tmp_path: Path) -> None:
    limits = ["trainer.max_steps=6", "checkpoint.every_steps=2", "health.max_skipped_steps=1", "data.batch_size=4"]
    with pytest.raises(NonFiniteError, match="max_skipped_steps=1") as caught:
        laboratory.train("microworld_stage1", tmp_path / "run", *limits, *callback("BreakBlock", first=3, last=99))
    assert "step 5" in caught.value.where
    run = RunDir(tmp_path / "run")
    said = [(row["step"], row["cause"]) for row in run.read_warnings()]
    assert said == [(4, "step_left_out"), (5, "stopped")]
    assert sorted(path.name for path in run.checkpoints.glob("step-*")) == ["step-0000002", "step-0000004"]
    more = [*limits, "health.max_skipped_steps=4", *callback("BreakBlock", first=3, last=4)]
    assert laboratory.train("microworld_stage1", tmp_path / "run", *more).step == 6
    rows = run.read_metrics()
    assert [row["step"] for row in rows] == list(range(1, 7)) and rows[-1]["skipped_steps"] == 2
    said = [(row["step"], row["cause"]) for row in run.read_warnings()]
    assert said == [(4, "step_left_out"), (5, "step_left_out")]  # "stopped" was taken back


@pytest.mark.parametrize("wrong", ["max_skipped_steps=-1", "settle_steps=1.5", "spike_size=.nan", "max_data_wait=yes"])
def test_a_threshold_that_is_none_is_refused_before_anything_is_built(
    laboratory: Laboratory, tmp_path: Path, wrong: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        laboratory.train("microworld_stage1", tmp_path / "run", f"health.{wrong}")
    assert caught.value.where == f"health.{wrong.split('=')[0]}"


@pytest.mark.slow
def test_a_healthy_training_has_no_warning(laboratory: Laboratory, tmp_path: Path) -> None:
    run = laboratory.train("microworld_stage1", tmp_path / "run", "trainer.max_steps=150", "data.batch_size=16").run
    assert run.read_warnings() == [] and not run.bad_steps.exists()
