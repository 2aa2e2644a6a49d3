"""Both stages train, touch nothing frozen, and hand their weights on."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from blip2train.checkpoint.find import find_checkpoint
from blip2train.checkpoint.io import WEIGHTS, read_metadata
from blip2train.cli.config import build
from blip2train.cli.evaluate import load_model, load_run_config
from blip2train.errors import CheckpointError, ConfigError
from blip2train.model.freezing import count_parameters
from blip2train.run_dir import RunDir, read_json


def frozen_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if not value.requires_grad}


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_weights_are_bit_identical_after_training(stage: int, stage1_run: RunDir, stage2_run: RunDir) -> None:
    run = stage1_run if stage == 1 else stage2_run
    config = load_run_config(run)
    trained, fresh = load_model(config, run), build(config.model)
    before, after = frozen_state(fresh), frozen_state(trained)
    assert before.keys() == after.keys() and len(before) > 30
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_frozen_weights_stay_untouched_in_the_trained_process(laboratory, tmp_path: Path) -> None:
    """Not only in what is saved: the very tensors of the training process, and no gradient reaches them."""
    import pytorch_lightning as pl

    from blip2train.cli.train import build_module

    config = laboratory.compose("microworld_stage2_opt", tmp_path, "init_from=scratch")
    module = build_module(config, None)
    module.configure_model()
    before = {name: value.clone() for name, value in frozen_state(module.model).items()}
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(module, datamodule=build(config.data))
    after = frozen_state(module.model)
    assert all(torch.equal(before[name], after[name]) and after[name].grad is None for name in before)
    assert all(not value.requires_grad for value in module.model.vision_encoder.parameters())


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpoint_is_trainable_weights_only(stage: int, stage1_run: RunDir, stage2_run: RunDir) -> None:
    run = stage1_run if stage == 1 else stage2_run
    folder = find_checkpoint(run)
    trainable, frozen = count_parameters(load_model(load_run_config(run), run))
    assert read_metadata(folder)["parameters"] == trainable
    size = (folder / WEIGHTS).stat().st_size
    assert trainable * 4 <= size <= trainable * 4 + 40_000 < (trainable + frozen) * 4
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        assert not [name for name in file.keys() if name.startswith(("vision_encoder", "language_model"))]  # noqa: SIM118


def test_stage2_starts_from_stage1_and_reports_every_tensor(stage2_run: RunDir) -> None:
    report = read_json(stage2_run.init_path)
    assert report["counts"] == read_json(stage2_run.manifest_path)["init"]["counts"]
    assert report["counts"]["checkpoint"] > 50
    random = [name for name, origin in report["origins"].items() if origin == "random"]
    assert random == ["projection.bias", "projection.weight"]
    assert "itm_head.weight" in report["dropped"] and "temperature" in report["dropped"]


def test_metrics_file_keeps_its_contract(stage1_run: RunDir, stage2_run: RunDir) -> None:
    rows = stage1_run.read_metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    wanted = {"train/loss", "train/itc_loss", "train/itm_loss", "train/itg_loss", "train/itm_accuracy"}
    assert wanted | {"samples_per_second", "data_wait_fraction", "learning_rate", "gradient_norm"} <= set(rows[0])
    total = rows[0]["train/itc_loss"] + rows[0]["train/itm_loss"] + rows[0]["train/itg_loss"]
    assert rows[0]["train/loss"] == pytest.approx(total, rel=1e-5)
    assert "train/lm_loss" in stage2_run.read_metrics()[0]


def test_steps_after_the_last_full_window_are_logged_too(laboratory, tmp_path: Path) -> None:
    run = laboratory.train("microworld_stage1", tmp_path / "run", "log_every_steps=3").run
    assert [row["step"] for row in run.read_metrics()] == [3, 4]


def test_learning_rate_ends_exactly_at_its_minimum(stage1_run: RunDir) -> None:
    rates = [row["learning_rate"] for row in stage1_run.read_metrics()]
    assert max(rates) <= load_run_config(stage1_run).optim.lr and rates[-1] == pytest.approx(1e-5, rel=1e-6)


def test_dropping_a_loss_drops_its_curve_and_its_pass(laboratory, tmp_path: Path) -> None:
    run = laboratory.train("ablation_no_itg", tmp_path / "run", "trainer.max_steps=2").run
    rows = run.read_metrics()
    assert not [name for name in rows[0] if "itg" in name]


def test_batch_of_one_trains(laboratory, tmp_path: Path) -> None:
    run = laboratory.train("microworld_stage1", tmp_path / "run", "data.batch_size=1", "trainer.max_steps=2").run
    assert run.read_metrics()[-1]["train/loss"] > 0


def test_bfloat16_autocast_trains(laboratory, stage1_run: RunDir, tmp_path: Path) -> None:
    for experiment in ("microworld_stage1", "microworld_stage2_opt"):
        start = "init_from=scratch" if "stage2" in experiment else "init_from=null"
        run = laboratory.train(experiment, tmp_path / experiment, "trainer.precision=bf16-mixed", start).run
        assert run.read_metrics()[-1]["train/loss"] < 12


def test_wrong_weights_for_stage2_are_refused(laboratory, stage1_run: RunDir, tmp_path: Path) -> None:
    """By its sizes before anything is built; by its tensors where the sizes do not show it. Neither leaves a run."""
    start, folder = f"init_from={stage1_run.path}", tmp_path / "run"
    with pytest.raises(ConfigError, match="another one: num_queries 8 there, 4 here"):
        laboratory.train("microworld_stage2_opt", folder, start, "model.qformer.num_queries=4")
    assert not folder.exists()
    with pytest.raises(CheckpointError, match="2 of .* tensors do not fit") as caught:
        laboratory.train("microworld_stage2_opt", folder, start, "model.ln_vision=false")
    assert "unexpected in the file: ln_vision.weight" in str(caught.value) and len(str(caught.value).splitlines()) < 8
    assert not RunDir(folder).config_path.exists() and not RunDir(folder).manifest_path.exists()


def test_unknown_tokenizer_size_is_refused_before_training(laboratory, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="vocab_size is stated as 70") as caught:
        laboratory.train("microworld_stage1", tmp_path, "tokenizer.vocab_size=70")
    assert isinstance(caught.value.__cause__, ConfigError)
