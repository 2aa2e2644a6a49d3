"""The timm adapter against timm's own `forward_intermediates`, and every way a weights file can fail to fit."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_model import IMAGE, VIT_ARGS, random_images, tiny_vit
from torch import Tensor, nn

from blip2train.batch import ImageSpec
from blip2train.errors import CheckpointError, ConfigError
from blip2train.model.vision_encoder.timm_vit import TimmVisionEncoder

CLIP = "vit_large_patch14_clip_quickgelu_224"
EVA = "eva_giant_patch14_clip_224"
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", VIT_ARGS),
    "clip": (CLIP, VIT_ARGS),
    "eva": (EVA, VIT_ARGS),
    "beit": ("beit_base_patch16_224", VIT_ARGS | {"global_pool": ""}),
}


def whole_model(name: str, model_args: dict[str, Any], size: int = 32) -> nn.Module:
    """timm's network with head and all blocks; normalisation layers are made non-trivial."""
    torch.manual_seed(3)
    model = timm.create_model(name, img_size=size, num_classes=7, **model_args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def normalised(pixels: Tensor, spec: ImageSpec = IMAGE) -> Tensor:
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("layer", "index"), [(-2, 1), (-1, 2), (0, 0), (2, 2), (-3, 0)])
@torch.no_grad()
def test_tokens_are_timms_intermediate_of_that_layer(family: str, layer: int, index: int, tmp_path: Path) -> None:
    name, model_args = FAMILIES[family]
    model = whole_model(name, model_args)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    options = {"indices": [index], "output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True}
    for final_norm in (False, True):
        encoder = tiny_vit(
            name=name,
            model_args=model_args,
            layer=layer,
            final_norm=final_norm,
            weights=str(tmp_path / "vit.safetensors"),
        ).eval()
        [(patches, prefix)] = model.forward_intermediates(normalised(random_images(2)), norm=final_norm, **options)
        tokens = encoder(random_images(2))
        assert tokens.shape == (2, encoder.num_tokens, encoder.embed_dim) == (2, 17, 24)
        torch.testing.assert_close(tokens, torch.cat([prefix, patches], dim=1), rtol=0, atol=2e-5)


def test_blocks_behind_the_layer_are_gone() -> None:
    assert len(tiny_vit(layer=-2).backbone.blocks) == 2
    assert not [
        name for name, _ in tiny_vit().named_parameters() if "head" in name or name.startswith("backbone.norm.")
    ]


def test_checkpoint_of_the_cut_tower_itself_loads(tmp_path: Path) -> None:
    encoder = tiny_vit()
    save_file(encoder.backbone.state_dict(), tmp_path / "cut.safetensors")
    torch.manual_seed(9)
    again = TimmVisionEncoder("vit_tiny_patch16_224", IMAGE, weights=str(tmp_path / "cut.safetensors"), layer=-1,
                              model_args=VIT_ARGS | {"depth": 2})  # fmt: skip
    assert torch.equal(again.eval()(random_images(1)), encoder.eval()(random_images(1)))


def test_a_pth_file_with_the_state_dict_under_model_loads(tmp_path: Path) -> None:
    model = whole_model("vit_tiny_patch16_224", VIT_ARGS)
    torch.save({"model": model.state_dict()}, tmp_path / "vit.pth")
    loaded = tiny_vit(weights=str(tmp_path / "vit.pth"))
    assert torch.equal(loaded.backbone.blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight)


def test_openai_clip_names_are_understood(tmp_path: Path) -> None:
    model = whole_model(CLIP, VIT_ARGS)
    theirs = {"visual.class_embedding": model.cls_token[0, 0], "visual.positional_embedding": model.pos_embed[0]}
    starts = {
        "patch_embed.proj.": "conv1.", "norm_pre.": "ln_pre.", "norm.": "ln_post.", "blocks.": "transformer.resblocks.",
    }  # fmt: skip
    middles = {
        ".norm1.": ".ln_1.", ".norm2.": ".ln_2.", ".attn.qkv.": ".attn.in_proj_", ".attn.proj.": ".attn.out_proj.",
        ".mlp.fc1.": ".mlp.c_fc.", ".mlp.fc2.": ".mlp.c_proj.",
    }  # fmt: skip
    for key, tensor in model.state_dict().items():
        if key in ("cls_token", "pos_embed") or key.startswith("head"):
            continue
        start = next(ours for ours in starts if key.startswith(ours))
        name = starts[start] + key.removeprefix(start)
        for ours, other in middles.items():
            name = name.replace(ours, other)
        theirs[f"visual.{name}"] = tensor
    torch.save(theirs, tmp_path / "clip.pth")
    loaded = tiny_vit(name=CLIP, weights=str(tmp_path / "clip.pth"))
    for key, tensor in loaded.backbone.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_another_image_size_resizes_the_position_embedding_without_antialiasing(tmp_path: Path) -> None:
    model = whole_model(EVA, VIT_ARGS)
    save_file(model.state_dict(), tmp_path / "eva.safetensors")
    image = ImageSpec(24, IMAGE.mean, IMAGE.std)
    resized = tiny_vit(name=EVA, image=image, weights=str(tmp_path / "eva.safetensors")).backbone.pos_embed[0]
    grid = model.pos_embed[0, 1:].detach().T.reshape(1, 24, 4, 4)
    expected = nn.functional.interpolate(grid, size=(3, 3), mode="bicubic", align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(resized[1:], expected, rtol=0, atol=1e-6)
    assert torch.equal(resized[0], model.pos_embed[0, 0])


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


def test_half_precision_weights_compute_the_same_features_in_float32(tmp_path: Path) -> None:
    full, half = tiny_vit().eval(), tiny_vit(dtype="bfloat16").eval()
    tokens = half(random_images(2))
    assert half.backbone.pos_embed.dtype == torch.bfloat16
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, full(random_images(2)), rtol=0, atol=0.1)
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
        ({"name": "resnet18", "model_args": {}}, "resnet18"),
        ({"name": "vit_tiny_patch16_224", "model_args": {"embed_dmi": 3}}, "embed_dmi"),
        ({"model_args": VIT_ARGS | {"img_size": 48}}, "model_args.img_size is 48, image.size is 32"),
        ({"pretrained": True, "weights": "x.pth"}, "both pretrained=true and weights"),
        ({"final_norm": True, "model_args": VIT_ARGS | {"global_pool": "avg"}}, "its tokens have no final norm"),
        ({"model_args": VIT_ARGS | {"num_heads": 5}}, "timm refuses vit_tiny_patch16_224"),
        ({"embed_dim": 25}, "embed_dim is stated as 25, vit_tiny_patch16_224 has 24"),
        ({"dtype": "fp16"}, "unknown dtype 'fp16'"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_vit(**change)


def test_pretrained_weights_that_cannot_be_fetched_are_an_error_that_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(ConfigError, match=r"no pretrained weights for vit_tiny_patch16_224: offline"):
        tiny_vit(pretrained=True)


def test_weights_that_do_not_fit_are_refused_with_their_keys(tmp_path: Path) -> None:
    state = whole_model("vit_tiny_patch16_224", VIT_ARGS).state_dict()
    lacking = {key: tensor for key, tensor in state.items() if key != "blocks.1.norm1.weight"}
    surplus = state | {"blocks.1.surprise": torch.zeros(1)}
    reshaped = state | {"blocks.0.norm1.weight": torch.zeros(25)}
    for name, wrong, message in (
        ("lacking", lacking, r"missing 1 \(blocks.1.norm1.weight\); unexpected 0"),
        ("surplus", surplus, r"missing 0; unexpected 1 \(blocks.1.surprise\)"),
        ("reshaped", reshaped, r"other shape 1 \(blocks.0.norm1.weight \(25,\) for \(24,\)\)"),
    ):
        save_file(wrong, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=message):
            tiny_vit(weights=str(tmp_path / f"{name}.safetensors"))


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not weights")
    (tmp_path / "text.pth").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": pytest.approx(1)}, tmp_path / "code.pth")
    for name in ("absent.pth", "text.safetensors", "text.pth", "list.pth", "code.pth"):
        with pytest.raises(CheckpointError, match=name):
            tiny_vit(weights=str(tmp_path / name))
