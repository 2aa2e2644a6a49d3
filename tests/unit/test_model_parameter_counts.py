"""Exact parameter counts of the paper's models as their configs describe them, at full size on the meta device.

LAVIS printed stage 1 with ViT-g, stage 2 with OPT-2.7B and its captioning; the others follow from the recipes: a ViT
cut before its last block, a BERT-base Q-Former, 32 queries, 30,523 words ([DEC] added) and one projection.
"""

import pytest
import torch
from torch import nn

from blip2train.cli.config import compose
from blip2train.cli.meta import build_meta
from blip2train.model.freezing import count_parameters

VIT_G, VIT_L = 985_894_528, 290_581_504
OPT_2_7B, OPT_6_7B, T5_XL, T5_XXL = 2_651_596_800, 6_658_473_984, 2_849_757_184, 11_135_332_352
TRAIN_VISION = ["model.vision_encoder.trainable_blocks=all", "model.vision_encoder.dtype=float32"]


def meta(experiment: str, *overrides: str) -> nn.Module:
    start = ["init_from=scratch"] if "stage2" in experiment else []
    return build_meta(compose("train", [f"experiment={experiment}", "run_dir=x", *start, *overrides]))


@pytest.mark.parametrize("kind", ["paper", "lavis"])
@pytest.mark.parametrize(
    ("experiment", "trainable", "frozen"),
    [
        ("stage1_vitg", 186_705_470, VIT_G),
        ("stage1_vitl", 183_165_758, VIT_L),
        ("stage2_vitg_opt_2_7b", 107_133_696, VIT_G + OPT_2_7B),
        ("stage2_vitl_opt_2_7b", 103_593_984, VIT_L + OPT_2_7B),
        ("stage2_vitg_opt_6_7b", 108_314_880, VIT_G + OPT_6_7B),
        ("stage2_vitg_flan_t5_xl", 106_739_968, VIT_G + T5_XL),
        ("stage2_vitl_flan_t5_xl", 103_200_256, VIT_L + T5_XL),
        ("stage2_vitg_flan_t5_xxl", 108_314_880, VIT_G + T5_XXL),
    ],
)
def test_presets(kind: str, experiment: str, trainable: int, frozen: int) -> None:
    model = meta(f"{kind}/{experiment}")
    assert count_parameters(model) == (trainable, frozen)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("experiment", "size", "parameters", "tokens"),
    [
        ("stage1_vitg", 224, VIT_G, 257),
        ("stage1_vitg", 364, 986_485_888, 677),
        ("stage1_vitg", 490, 987_258_880, 1226),
        ("stage1_vitl", 224, VIT_L, 257),
    ],
)
def test_frozen_vision_encoder_at_its_image_sizes(experiment: str, size: int, parameters: int, tokens: int) -> None:
    encoder = meta(f"paper/{experiment}", f"model.vision_encoder.image.size={size}").get_submodule("vision_encoder")
    assert count_parameters(encoder) == (0, parameters)
    assert encoder.num_tokens == tokens


@pytest.mark.parametrize(
    ("experiment", "trainable", "frozen"),
    [
        ("stage1_vitg", 1_173_191_358, 0),  # retrieval
        ("stage1_vitl", 474_177_342, 0),
        ("stage2_vitg_opt_2_7b", 1_093_619_584, OPT_2_7B),  # captioning
    ],
)
def test_fine_tuning_at_364_trains_the_encoder_too(experiment: str, trainable: int, frozen: int) -> None:
    model = meta(f"paper/{experiment}", "model.vision_encoder.image.size=364", *TRAIN_VISION)
    assert count_parameters(model) == (trainable, frozen)


def test_each_part_has_the_number_format_of_its_yaml() -> None:
    model = meta("paper/stage2_vitg_flan_t5_xl")
    formats = {
        name: {item.dtype for item in part.parameters()} for name, part in model.named_children()
    }  # nothing reads a value, so nothing may fall back to float32
    assert formats["vision_encoder"] == {torch.float16} and formats["language_model"] == {torch.bfloat16}
    assert formats["qformer"] == formats["projection"] == {torch.float32}
