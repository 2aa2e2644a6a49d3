"""A part in a format it cannot have, and contradicting first weights, stop a run before anything is read."""

import logging
from pathlib import Path

import pytest
from omegaconf import DictConfig

from blip2train.cli import check
from blip2train.cli.config import compose, resolved_yaml
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir


def composed(*overrides: str, experiment: str = "microworld_stage1") -> DictConfig:
    return compose("train", [f"experiment={experiment}", *overrides, "run_dir=outputs/x"])


@pytest.fixture
def stage1_folder(tmp_path: Path) -> Path:
    """A folder with the config of a stage-1 run; checks read nothing else of it."""
    RunDir(tmp_path).config_path.write_text(resolved_yaml(composed()), encoding="utf-8")
    return tmp_path


def stage2(folder: Path, *overrides: str) -> DictConfig:
    return composed(f"init_from={folder}", *overrides, experiment="microworld_stage2_opt")


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "transformer-engine"])
def test_a_trainer_that_stores_the_qformer_in_half_precision(precision: str) -> None:
    with pytest.raises(ConfigError, match=f"{precision} stores the Q-Former in half precision"):
        check.check_train(composed(f"trainer.precision={precision}"))


def test_deepspeed_takes_no_precision_that_needs_a_loss_scaler() -> None:
    overrides = ["experiment=lavis/stage1_vitg", "trainer=deepspeed_zero2", "trainer.devices=16", "run_dir=outputs/x"]
    with pytest.raises(ConfigError, match=r"DeepSpeed under trainer.precision=16-mixed"):
        check.check_train(compose("train", overrides))
    check.check_train(compose("train", [*overrides, "trainer.precision=bf16-mixed"]))


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "fsdp", "deepspeed"])
def test_a_strategy_whose_checkpoints_only_it_can_read(strategy: str) -> None:
    with pytest.raises(ConfigError, match=f"strategy '{strategy}'"):
        check.check_train(composed(f"+trainer.strategy={strategy}"))
    check.check_train(composed("+trainer.strategy=ddp_spawn"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_trainer_with_float32_masters(precision: str) -> None:
    check.check_train(composed(f"trainer.precision={precision}"))


def test_a_trained_vision_encoder_is_float32(stage1_folder: Path) -> None:
    half = "model.vision_encoder.dtype=float16"
    check.check_train(composed(half))
    check.check_train(composed("++model.vision_encoder.trainable_blocks=2"))
    for blocks in ("2", "all"):
        with pytest.raises(ConfigError, match="a trainable vision encoder in float16"):
            check.check_train(composed(half, f"++model.vision_encoder.trainable_blocks={blocks}"))


def test_a_t5_is_never_float16() -> None:
    start, half = "init_from=scratch", "llm.model.dtype=float16"
    check.check_train(composed(start, half, experiment="microworld_stage2_opt"))
    check.check_train(composed(start, "llm.model.dtype=bfloat16", experiment="microworld_stage2_t5"))
    with pytest.raises(ConfigError, match=r"encoder-decoder language model in float16: T5[\s\S]*bfloat16"):
        check.check_train(composed(start, half, experiment="microworld_stage2_t5"))


def test_one_source_for_the_qformer(stage1_folder: Path) -> None:
    check.check_train(stage2(stage1_folder))
    check.check_train(composed("init_from=scratch", "init_qformer=some/bert", experiment="microworld_stage2_opt"))
    check.check_train(composed("init_qformer=some/bert"))
    with pytest.raises(ConfigError, match=r"two sources[\s\S]*init_qformer=null"):
        check.check_train(stage2(stage1_folder, "init_qformer=some/bert"))
    with pytest.raises(ConfigError, match="two sources"):
        check.check_train(composed(f"init_from={stage1_folder}", "init_qformer=some/bert"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.qformer.hidden_size=48", "hidden_size 96 there, 48 here"),
        ("model.qformer.num_heads=8", "num_heads 4 there, 8 here"),  # no tensor's shape would show it
        ("model.qformer.num_queries=4", "num_queries 8 there, 4 here"),
        ("model.qformer.image_dim=48", "image_dim 96 there, 48 here"),
    ],
)
def test_a_qformer_of_other_sizes_names_both_numbers(stage1_folder: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check.check_train(stage2(stage1_folder, change))
    assert len(str(caught.value).splitlines()) == 3


def test_another_vision_encoder_of_the_same_width_is_warned_of(
    stage1_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check.check_train(stage2(stage1_folder))
        assert not caplog.records
        check.check_train(stage2(stage1_folder, "model.vision_encoder.layer=-2"))
    assert "trained on a vision encoder with layer -1; this one has -2" in caplog.text
