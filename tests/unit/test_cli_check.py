"""Contradictions between fields stop a run before anything is read or built."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from blip2train.cli import check
from blip2train.cli.config import compose
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir


def composed(*overrides: str):
    return compose("train", [*overrides, "run_dir=outputs/x"])


def test_stage_two_needs_stage_one_weights_or_an_explicit_scratch() -> None:
    with pytest.raises(ConfigError, match="no stage-1 weights") as caught:
        check.check_train(composed("experiment=microworld_stage2_opt"))
    assert "init_from=scratch" in str(caught.value)
    check.check_train(composed("experiment=microworld_stage2_opt", "init_from=scratch"))


def test_init_from_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run in[\s\S]*where: init_from="):
        check.check_train(composed("experiment=microworld_stage2_opt", f"init_from={tmp_path}"))


def test_stage_and_model_must_belong_together() -> None:
    with pytest.raises(ConfigError, match="stage 1 cannot train a stage-2 model"):
        check.check_train(composed("experiment=microworld_stage2_opt", "stage=stage1", "init_from=scratch"))


def test_global_batch_must_be_the_one_the_experiment_expects() -> None:
    check.check_train(composed("experiment=paper/stage1_vitg"))
    check.check_train(composed("experiment=paper/stage1_vitg", "trainer.devices=8"))  # 210 per device
    with pytest.raises(ConfigError, match="the global batch is 840, the experiment expects 1680"):
        check.check_train(composed("experiment=paper/stage1_vitg", "trainer.devices=8", "data.batch_size=105"))


@pytest.mark.parametrize("override", ["data.batch_size=0", "trainer.accumulate_grad_batches=2000"])
def test_a_device_without_a_pair_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="batch_size=0, global_batch_size=None"):
        check.check_train(composed("experiment=paper/stage1_vitg", "expected_global_batch=null", override))


def test_only_stage_one_speaks_of_negatives(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="blip2train")
    check.check_train(composed("experiment=paper/stage1_vitg", "trainer.accumulate_grad_batches=5"))
    check.check_train(composed("experiment=paper/stage2_vitg_opt_2_7b", "init_from=scratch"))
    batches = [message for message in caplog.messages if "global batch" in message]
    assert batches == ["global batch 1680; contrastive negatives come from 336 of it", "global batch 1920"]


def test_a_log_window_without_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="log_every_steps is 0"):
        check.check_train(composed("experiment=microworld_stage1", "log_every_steps=0"))


def test_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="60 warm-up steps in a run of 50"):
        check.check_train(composed("experiment=microworld_stage1", "trainer.max_steps=50"))


def test_resuming_with_other_settings_names_them_and_harmless_ones_pass() -> None:
    before = composed("experiment=microworld_stage1")
    harmless = composed(
        *("experiment=microworld_stage1", "data.num_workers=0", "checkpoint.every_steps=7"),
        "model.qformer.checkpoint_activations=true",
    )
    check.check_same_run(harmless, OmegaConf.create(OmegaConf.to_container(before, resolve=True)), RunDir(Path("x")))
    moved = composed("experiment=microworld_stage1", "paths.data=elsewhere")
    check.check_same_run(moved, before, RunDir(Path("x")))
    with pytest.raises(ConfigError, match=r"optim\.lr: \S+ -> 0\.5"):
        check.check_same_run(composed("experiment=microworld_stage1", "optim.lr=0.5"), before, RunDir(Path("x")))


def test_no_stage_says_what_to_choose() -> None:
    with pytest.raises(ConfigError, match="no stage, no model, no data, no optim chosen"):
        check.check_train(composed())


def test_a_staircase_without_whole_epochs_is_refused_before_anything_is_built() -> None:
    staircase = ["experiment=microworld_stage1", "optim.schedule=epoch_staircase"]
    check.check_train(composed(*staircase, "optim.steps_per_epoch=100"))
    with pytest.raises(ConfigError, match="max_steps is 600 and steps_per_epoch is 7"):
        check.check_train(composed(*staircase, "optim.steps_per_epoch=7"))


@pytest.mark.parametrize("name", ["itc", "itm", "itg"])
@pytest.mark.parametrize("experiment", ["microworld_stage1", "lavis/stage1_vitg"])
def test_a_loss_whose_settings_an_experiment_changes_can_be_removed(experiment: str, name: str) -> None:
    """Hydra removes what the group brought; what the experiment set of it must not stay behind as half a loss."""
    config = composed(f"experiment={experiment}", f"~objective@stage.objectives.{name}")
    check.check_train(config)
    assert sorted(config.stage.objectives) == sorted({"itc", "itm", "itg"} - {name})
    assert all("_target_" in objective for objective in config.stage.objectives.values())
