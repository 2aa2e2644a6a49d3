"""A vision encoder that was trained once stays with the model: through stage 2, where it is frozen, and ever after."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import OPT, random_images, tiny_stage1, tiny_stage2

from blip2train.checkpoint.io import OWN_WEIGHTS, STAGE1_ONLY, STAGE2_ONLY, load_weights, save_checkpoint
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.language_model.decoder_only import DecoderOnly


def stage2(**vision: object) -> Blip2Stage2:
    return tiny_stage2(DecoderOnly(OPT), vision=vision)


def shifted_stage1(trainable_blocks: int | str, path: Path) -> dict[str, torch.Tensor]:
    """Weights of a stage 1 whose trained vision tensors have moved; written to `path`."""
    model = tiny_stage1(vision={"trainable_blocks": trainable_blocks})
    with torch.no_grad():
        for parameter in model.vision_encoder.parameters():
            parameter.add_(0.3 * parameter.requires_grad)
    return load_file(save_checkpoint(model, path, {"stage": 1}))


@pytest.mark.parametrize(("trainable_blocks", "tensors"), [(1, 12), ("all", 28)])
def test_a_vision_encoder_trained_in_stage_1_is_in_the_checkpoints_of_a_frozen_stage_2(
    trainable_blocks: int | str, tensors: int, tmp_path: Path
) -> None:
    first = shifted_stage1(trainable_blocks, tmp_path / "stage1")
    vision = {name for name in first if name.startswith("vision_encoder.")}
    assert len(vision) == tensors
    model = stage2()
    untrained = model.visual_prompt(random_images(1))
    load_weights(model, tmp_path / "stage1" / "model.safetensors", leave=STAGE1_ONLY, fresh=STAGE2_ONLY + OWN_WEIGHTS)
    expected = model.eval().visual_prompt(random_images(1))
    assert not torch.allclose(expected, untrained, atol=1e-3)
    for hop in ("stage2", "resumed", "evaluated"):  # each saves what it was given, and the next is built afresh
        saved = load_file(save_checkpoint(model, tmp_path / hop, {"stage": 2}))
        assert {name for name in saved if name.startswith("vision_encoder.")} == vision
        assert all(torch.equal(saved[name], first[name]) for name in vision)
        model = stage2().eval()
        load_weights(model, tmp_path / hop / "model.safetensors")
        assert torch.equal(model.visual_prompt(random_images(1)), expected)
    assert not any(parameter.requires_grad for parameter in model.vision_encoder.parameters())


def test_a_vision_encoder_that_never_trained_is_in_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tiny_stage1(), tmp_path / "stage1", {"stage": 1})
    model = stage2()
    load_weights(model, tmp_path / "stage1" / "model.safetensors", leave=STAGE1_ONLY, fresh=STAGE2_ONLY)
    saved = load_file(save_checkpoint(model, tmp_path / "stage2", {"stage": 2}))
    assert not [name for name in saved if name.startswith("vision_encoder.")]


def test_blocks_trained_in_both_stages_and_in_one_are_all_kept(tmp_path: Path) -> None:
    first = shifted_stage1("all", tmp_path / "stage1")
    model = stage2(trainable_blocks=1)
    load_weights(model, tmp_path / "stage1" / "model.safetensors", leave=STAGE1_ONLY, fresh=STAGE2_ONLY + OWN_WEIGHTS)
    with torch.no_grad():
        model.vision_encoder.backbone.blocks[1].mlp.fc2.bias.add_(1.0)
    saved = load_file(save_checkpoint(model, tmp_path / "stage2", {"stage": 2}))
    bias = "vision_encoder.backbone.blocks.1.mlp.fc2.bias"
    assert torch.equal(saved[bias], first[bias] + 1.0)
    position = "vision_encoder.backbone.pos_embed"
    assert torch.equal(saved[position], first[position])
