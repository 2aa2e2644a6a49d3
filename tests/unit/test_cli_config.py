"""Composition finds the shipped configs, and a mistake in an override says what exists."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from blip2train.cli.config import (
    PACKAGE_DIR,
    compose,
    explain_overrides,
    quiet_libraries,
    require_filled,
    resolved_yaml,
)
from blip2train.cli.main import VERBS
from blip2train.errors import ConfigError


def test_mistyped_key_names_the_keys_that_exist_and_the_closest() -> None:
    (hint,) = explain_overrides("train", ["experiment=microworld_stage1", "optim.lrr=1"])
    assert "there is no 'lrr' in optim" in hint
    assert "warmup_steps" in hint and "Did you mean optim.lr?" in hint


def test_mistyped_key_in_process_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="Did you mean stage.objectives"):
        compose("train", ["experiment=microworld_stage1", "stage.objective.itg.weight=2"])


def test_unknown_group_option_lists_the_options() -> None:
    with pytest.raises(ConfigError, match="Could not find 'experiment/nope'"):
        compose("train", ["experiment=nope"])


def test_unknown_preset_names_those_in_folders_and_the_closest() -> None:
    """Hydra lists the top of a group alone, and the presets are below it."""
    (hint,) = explain_overrides("train", ["experiment=paper/stage1_vit_g", "trainer.devices=16"])
    assert "lavis/stage2_vitg_opt_2_7b" in hint and "_common" not in hint
    assert hint.endswith("Did you mean paper/stage1_vitg?")
    assert not explain_overrides("train", ["--config-dir=mine", "experiment=mine"])
    assert not explain_overrides("evaluate", ["benchmark=[vqav2,nocaps]", "run=x"])


def test_values_nobody_gave_are_named() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_steps"):
        require_filled(compose("train", []))


@pytest.mark.parametrize("benchmark", ["microworld_retrieval", "microworld_caption", "vqav2"])
def test_an_evaluation_may_name_a_benchmark_that_points_into_the_run(benchmark: str) -> None:
    """`model.vision_encoder.image`, `llm.tokenizer` and their like are in the run's config, which is not read yet."""
    require_filled(compose("evaluate", ["run=outputs/x", f"benchmark={benchmark}"]))
    with pytest.raises(ConfigError, match=r"^1 mandatory values are not set: run\n"):
        require_filled(compose("evaluate", [f"benchmark={benchmark}"]))


def test_image_size_and_width_follow_the_encoder_everywhere() -> None:
    config = compose("train", ["experiment=paper/stage1_vitg", "model/vision_encoder=clip_vit_l"])
    assert config.model.qformer.image_dim == 1024
    assert config.data.datasets.coco.transform.spec.size == config.model.vision_encoder.image.size == 224


def test_a_loss_is_dropped_by_one_override() -> None:
    config = compose("train", ["experiment=microworld_stage1", "~objective@stage.objectives.itg"])
    assert sorted(config.stage.objectives) == ["itc", "itm"]
    assert config.stage == compose("train", ["experiment=ablation_no_itg"]).stage


def test_one_more_dataset_is_one_override() -> None:
    config = compose("train", ["experiment=lavis/stage1_vitg", "+data/dataset@data.datasets.mine=folder"])
    assert sorted(config.data.datasets) == ["coco", "mine", "visual_genome"]


def test_saved_config_is_resolved_but_names_no_path_of_this_machine() -> None:
    text = resolved_yaml(compose("train", ["experiment=microworld_stage1", "run_dir=outputs/x"]))
    assert str(PACKAGE_DIR) not in text and "${package_dir:}/microworld" in text
    loaded = OmegaConf.create(text)
    assert Path(loaded.tokenizer.path).parent == PACKAGE_DIR / "microworld" / "assets"
    assert loaded.optim.max_steps == loaded.trainer.max_steps


def test_help_is_quick_and_names_every_verb() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "blip2train.cli.main", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for verb in ("train", "evaluate", "show", "report", "data", "quickstart", "microworld"):
        assert verb in done.stdout
    assert "torch" not in done.stderr and "hydra" not in done.stderr


def test_help_of_a_verb_waits_for_no_torch() -> None:
    modules = [f"blip2train.cli.{verb}{'.__main__' if verb == 'doctor' else ''}" for verb in VERBS]
    code = f"import sys, importlib as i; [i.import_module(name) for name in {modules}]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"blip2train.cli.train"} <= {*done.stdout.split()}
    assert not {"torch", "numpy", "transformers", "pytorch_lightning"} & {*done.stdout.split()}


def test_unknown_verb_suggests_the_closest() -> None:
    done = subprocess.run([sys.executable, "-m", "blip2train.cli.main", "trian"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'train'?" in done.stderr


def test_hints_leave_out_what_hydra_itself_takes() -> None:
    """`show` adds overrides of its own to a reader's; only the reader's mistake is explained."""
    hints = explain_overrides("train", ["experiment=microworld_stage1", "optim.lrr=1", "hydra.run.dir=."])
    assert len(hints) == 1 and hints[0].startswith("optim.lrr: there is no 'lrr' in optim")


@pytest.mark.parametrize("devices", ["auto", "[0,1]", "0"])
def test_devices_without_a_number_say_why_the_batch_needs_one(devices: str, tmp_path: Path) -> None:
    """A preset states the global batch; the error behind OmegaConf's is ours, not one of `int()`."""
    command = [sys.executable, "-m", "blip2train.cli.show", "config", "experiment=paper/stage1_vitg"]
    done = subprocess.run([*command, f"trainer.devices={devices}"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "ConfigError: a global batch of 1680 cannot be divided by" in done.stderr
    assert "where: trainer.devices" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["experiment=microworld_stage1", "--cfg", "job"], ["--cfg", "job", "experiment=microworld_stage1"]]
)
def test_a_flag_may_stand_before_or_behind_the_overrides_of_a_sub_verb(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blip2train.cli.show", "params", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "depth: 1" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_deepspeeds_word_on_the_cpu_is_kept_back_and_no_other(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_libraries()
    logger = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(logger, "propagate", True)  # DeepSpeed turns it off once it is imported
    logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
    logger.warning("a real problem")
    assert {record.getMessage() for record in caplog.records} == {"a real problem"}  # twice, if pytest hears it twice
