"""A vision encoder that trains in stage 1 goes through Lightning, checkpoints, stage 2, resume and evaluation."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from blip2train.checkpoint.find import find_checkpoint
from blip2train.checkpoint.io import WEIGHTS
from blip2train.cli.config import build
from blip2train.cli.evaluate import load_model, load_run_config
from blip2train.run_dir import RunDir

ENCODER = "model.vision_encoder"


@pytest.fixture(scope="module")
def unfrozen_run(laboratory, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Stage 1 that trained the last two of the micro-world ViT's three blocks, recomputing their activations."""
    options = (f"{ENCODER}.trainable_blocks=2", f"{ENCODER}.checkpoint_activations=true", "optim.lr=1e-3")
    return laboratory.train("microworld_stage1", tmp_path_factory.mktemp("unfrozen") / "stage1", *options).run


def vision_of(run: RunDir) -> dict[str, Tensor]:
    return {k: t for k, t in load_file(find_checkpoint(run) / WEIGHTS).items() if k.startswith("vision_encoder.")}


def test_the_checkpoint_holds_the_trained_blocks_and_they_have_moved(unfrozen_run: RunDir) -> None:
    saved, shipped = vision_of(unfrozen_run), build(load_run_config(unfrozen_run).model).state_dict()
    trained = (
        "vision_encoder.backbone.blocks.1.",
        "vision_encoder.backbone.blocks.2.",
        "vision_encoder.backbone.norm.",
    )
    assert set(saved) == {name for name in shipped if name.startswith(trained)}
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert not [name for name, tensor in saved.items() if torch.equal(tensor, shipped[name])]


def test_a_frozen_stage_2_keeps_what_stage_1_trained_after_a_resume_too(
    unfrozen_run: RunDir, laboratory, tmp_path: Path
) -> None:
    options = (f"init_from={unfrozen_run.path}", "init_qformer=null", "optim.max_steps=4")
    run = laboratory.train("microworld_stage2_opt", tmp_path / "stage2", *options, "trainer.max_steps=2").run
    run = laboratory.train("microworld_stage2_opt", tmp_path / "stage2", *options, "trainer.max_steps=4").run
    assert find_checkpoint(run).name == "step-0000004"
    first, second = vision_of(unfrozen_run), vision_of(run)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    evaluated = load_model(load_run_config(run), run)
    assert not any(parameter.requires_grad for parameter in evaluated.get_submodule("vision_encoder").parameters())
    weights = evaluated.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in first.items())


def test_a_frozen_run_may_start_one_that_trains_its_encoder(laboratory, stage1_run: RunDir, tmp_path: Path) -> None:
    options = (f"init_from={stage1_run.path}", f"{ENCODER}.trainable_blocks=all", "trainer.max_steps=2")
    saved = vision_of(laboratory.train("microworld_stage1", tmp_path / "tuned", *options).run)
    assert "vision_encoder.backbone.pos_embed" in saved and "vision_encoder.backbone.cls_token" in saved
