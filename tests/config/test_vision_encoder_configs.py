"""Every vision encoder that ships, found by globbing: composes with both stages and builds at full size on meta."""

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from blip2train.batch import ImageSpec
from blip2train.cli.config import build, compose, config_dir
from blip2train.cli.meta import build_meta, without_weights
from blip2train.model.freezing import count_parameters

ENCODERS = sorted(path.stem for path in (config_dir() / "model" / "vision_encoder").glob("*.yaml"))
STAGE1 = ["stage=stage1", "model=blip2_stage1", "data=stage1", "data/tokenizer=microworld", "optim=adamw_stage1"]
EXPECTED = {
    # parameters of the kept blocks and embeddings, width, tokens; the first two are LAVIS's counts
    "eva_clip_g": (985_894_528, 1408, 257),
    "clip_vit_l": (290_581_504, 1024, 257),
    # by hand: depth x (4 I^2 + 2 I M + 9 I + M) + patch embedding + positions (+ tokens, layer scales)
    "siglip": (26 * (4 * 1152**2 + 2 * 1152 * 4304 + 9 * 1152 + 4304) + 1152 * (588 + 1) + 256 * 1152, 1152, 256),
    "siglip2": (26 * (4 * 1152**2 + 2 * 1152 * 4304 + 9 * 1152 + 4304) + 1152 * (588 + 1) + 256 * 1152, 1152, 256),
    "dinov2": (23 * (12 * 1024**2 + 15 * 1024) + 1024 * (588 + 1) + (256 + 1 + 4) * 1024, 1024, 261),
    "dinov3": (23 * (12 * 1024**2 + 12 * 1024) + 1024 * (768 + 1) + (1 + 4) * 1024, 1024, 261),
    "vit_base": (11 * (12 * 768**2 + 13 * 768) + 768 * (768 + 1) + (196 + 1) * 768 + 768, 768, 197),
    "tiny": (None, 96, 17),
}


def composed(encoder: str, *overrides: str) -> Any:
    return compose("train", [*STAGE1, f"model/vision_encoder={encoder}", "run_dir=outputs/x", *overrides])


def build_vision(config: Any) -> Any:
    with torch.device("meta"):
        return build(without_weights(config)["vision_encoder"])


def test_every_encoder_that_ships_has_an_expected_size() -> None:
    assert set(ENCODERS) == set(EXPECTED)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoder_builds_at_full_size_on_meta_with_the_expected_counts(encoder: str) -> None:
    parameters, width, tokens = EXPECTED[encoder]
    model = build_meta(composed(encoder))
    vision = model.get_submodule("vision_encoder")
    trainable, frozen = count_parameters(vision)
    assert trainable == 0
    assert parameters in (frozen, None)
    assert (vision.embed_dim, vision.num_tokens, model.get_submodule("qformer").image_dim) == (width, tokens, width)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_transform_reads_the_encoders_own_image_settings(encoder: str) -> None:
    config = composed(encoder, "+data/dataset@data.datasets.coco=coco")
    specs = [build(config.model.vision_encoder.image), build(config.data.datasets.coco.transform.spec)]
    assert isinstance(specs[0], ImageSpec)
    assert specs[0] == specs[1]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_last_blocks_or_everything_may_train(encoder: str) -> None:
    node = "model.vision_encoder"
    options = (f"{node}.dtype=float32", f"{node}.checkpoint_activations=true")
    last_two = build_vision(composed(encoder, f"{node}.trainable_blocks=2", *options))
    trained = {name for name, parameter in last_two.named_parameters() if parameter.requires_grad}
    depth = len(last_two.backbone.blocks)
    last = (f"backbone.blocks.{depth - 1}.", f"backbone.blocks.{depth - 2}.", "backbone.norm.")
    assert trained == {name for name, _ in last_two.named_parameters() if name.startswith(last)}
    everything = build_vision(composed(encoder, f"{node}.trainable_blocks=all", *options))
    assert count_parameters(everything) == (sum(count_parameters(last_two)), 0)
    assert everything.backbone.grad_checkpointing


@pytest.mark.parametrize(("encoder", "size", "tokens"), [("eva_clip_g", 364, 677), ("eva_clip_g", 490, 1226),
                                                         ("clip_vit_l", 364, 677), ("siglip", 364, 676),
                                                         ("dinov2", 490, 1230), ("dinov3", 512, 1029)])  # fmt: skip
def test_another_image_size_is_one_override(encoder: str, size: int, tokens: int) -> None:
    vision = build_vision(composed(encoder, f"model.vision_encoder.image.size={size}"))
    assert (vision.image.size, vision.num_tokens) == (size, tokens)


def test_stages_state_the_epsilon_of_lavis() -> None:
    for stage in ("blip2_stage1", "blip2_stage2"):
        assert OmegaConf.load(config_dir() / "model" / f"{stage}.yaml").ln_vision_eps == 1e-5
    model = build_meta(composed("tiny", "model.ln_vision_eps=1e-6"))
    norm = model.get_submodule("ln_vision")
    assert isinstance(norm, torch.nn.LayerNorm) and norm.eps == 1e-6
