"""The timm adapter itself: what is cut, what timm's data config says, and every setting that cannot be built."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_model import IMAGE, VIT_ARGS, random_images, tiny_vit
from torch import Tensor, nn

from blip2train.batch import ImageSpec
from blip2train.errors import ConfigError
from blip2train.model.vision_encoder.timm_vit import TimmVisionEncoder, image_spec

EVA = "eva_giant_patch14_clip_224"


def test_blocks_behind_the_layer_are_gone() -> None:
    assert len(tiny_vit(layer=-2).backbone.blocks) == 2
    assert not [
        name for name, _ in tiny_vit().named_parameters() if "head" in name or name.startswith("backbone.norm.")
    ]


class Stem(nn.Module):
    """A convolutional patch embedding that timm has never seen."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: object) -> None:
        super().__init__()
        self.grid_size = (img_size // patch_size,) * 2
        self.num_patches = self.grid_size[0] ** 2
        self.convs = nn.Sequential(
            nn.Conv2d(in_chans, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, embed_dim, patch_size // 2, patch_size // 2)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.convs(pixels).flatten(2).transpose(1, 2)


def test_a_home_made_patch_embedding_works_with_weights(tmp_path: Path) -> None:
    encoder = tiny_vit(model_args=VIT_ARGS | {"embed_layer": Stem})
    save_file(encoder.backbone.state_dict(), tmp_path / "stem.safetensors")
    again = tiny_vit(model_args=VIT_ARGS | {"embed_layer": Stem}, weights=str(tmp_path / "stem.safetensors"))
    assert torch.equal(again.eval()(random_images(2)), encoder.eval()(random_images(2)))
    assert encoder.num_tokens == 17


def test_half_precision_weights_compute_in_their_own_format_whatever_autocast_says() -> None:
    half = tiny_vit(dtype="bfloat16")
    tokens = half(random_images(2))
    assert half.backbone.pos_embed.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(half(random_images(2)), tokens)


def test_normalisation_is_no_part_of_a_checkpoint() -> None:
    assert not [name for name in tiny_vit().state_dict() if "backbone" not in name]


def test_images_of_another_size_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"48x48.*32x32"):
        tiny_vit()(random_images(1, size=48))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 3}, "layer is 3, but vit_tiny_patch16_224 has 3 blocks"),
        ({"layer": -4}, "layer is -4"),
        ({"name": "vit_tiny_patch61_224"}, "timm has no model 'vit_tiny_patch61_224'"),
        ({"name": "vit_tiny_patch16_224.no_such_tag"}, "Invalid pretrained tag"),
        ({"name": "resnet18", "model_args": {}}, "resnet18 is of timm's resnet family, not a ViT"),
        ({"name": "convnext_tiny", "model_args": {}}, "convnext_tiny is of timm's convnext family, not a ViT"),
        ({"name": "vit_smal_patch16_224"}, "near it: vit_small_patch16_224"),
        ({"layer": "last"}, "layer is 'last'"),
        ({"name": "swin_tiny_patch4_window7_224", "model_args": {}}, "SwinTransformer, not a ViT"),
        ({"name": "vit_tiny_patch16_224", "model_args": {"embed_dmi": 3}}, "embed_dmi"),
        ({"model_args": VIT_ARGS | {"img_size": 48}}, "model_args.img_size is 48, image.size is 32"),
        ({"pretrained": True, "weights": "x.pth"}, "both pretrained=true and weights"),
        ({"final_norm": True, "model_args": VIT_ARGS | {"global_pool": "avg"}}, "its tokens have no final norm"),
        ({"model_args": VIT_ARGS | {"num_heads": 5}}, "timm refuses vit_tiny_patch16_224"),
        ({"embed_dim": 25}, "embed_dim is stated as 25, vit_tiny_patch16_224 has 24"),
        ({"dtype": "fp16"}, "unknown dtype 'fp16'"),
        ({"name": EVA, "align_corners": True}, "timm cannot resize the position embedding of a Eva"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_vit(**change)


@pytest.mark.parametrize(
    ("name", "size", "patch", "near"),
    [
        ("vit_tiny_patch16_224", 225, 8, "224 or 232"),
        (EVA, 363, 14, "350 or 364"),
        ("vit_tiny_patch16_224", 5, 8, "8 or 8"),
    ],
)
def test_a_size_that_is_no_multiple_of_the_patch_is_refused_before_anything_is_built(
    name: str, size: int, patch: int, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices, create = [], timm.create_model

    def watched(*args: Any, **kwargs: Any) -> nn.Module:
        model = create(*args, **kwargs)
        devices.append(next(model.parameters()).device.type)
        return model

    monkeypatch.setattr("timm.create_model", watched)
    with pytest.raises(ConfigError, match=rf"images of {size} pixels cannot be cut into patches of {patch}") as caught:
        tiny_vit(name=name, image=ImageSpec(size, IMAGE.mean, IMAGE.std), model_args=VIT_ARGS | {"patch_size": patch},
                 weights="read/too/early.pth")  # fmt: skip
    assert near in caught.value.fix
    assert devices == ["meta"]


def test_the_check_on_the_meta_device_draws_no_random_number() -> None:
    torch.manual_seed(7)
    expected = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **VIT_ARGS)
    torch.manual_seed(7)
    built = TimmVisionEncoder("vit_tiny_patch16_224", IMAGE, model_args=VIT_ARGS)
    assert torch.equal(built.backbone.blocks[1].mlp.fc1.weight, expected.blocks[1].mlp.fc1.weight)


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "size", "mean", "std"),
    [
        ("eva_giant_patch14_clip_224.laion400m", 224, CLIP_MEAN, CLIP_STD),
        ("vit_large_patch14_clip_quickgelu_224.openai", 224, CLIP_MEAN, CLIP_STD),
        ("vit_so400m_patch14_siglip_224.v2_webli", 224, HALF, HALF),
        ("vit_large_patch14_reg4_dinov2.lvd142m", 518, IMAGENET_MEAN, IMAGENET_STD),
        ("vit_large_patch16_dinov3.lvd1689m", 256, IMAGENET_MEAN, IMAGENET_STD),
        ("vit_large_patch16_dinov3.sat493m", 256, (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
    ],
)
def test_image_settings_are_those_the_authors_published(
    name: str, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    assert image_spec(name) == ImageSpec(size, mean, std, "bicubic")
    assert image_spec(name, size=448) == ImageSpec(448, mean, std, "bicubic")
    changed = image_spec(name, mean=HALF, std=HALF, interpolation="bilinear")
    assert changed == ImageSpec(size, HALF, HALF, "bilinear")


@pytest.mark.parametrize("name", ["vit_tiny_patch61_224", "vit_base_patch16_224.no_such_tag"])
def test_image_settings_of_an_unknown_name_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"timm has no model|Invalid pretrained tag"):
        image_spec(name)
