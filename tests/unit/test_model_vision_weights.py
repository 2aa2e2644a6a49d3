"""Weights into the ViT: every layout that must load, the position embedding's resize, and each file that must not."""

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_model import IMAGE, VIT_ARGS, random_images, tiny_vit
from torch import Tensor
from vit_family import FAMILIES, save_whole, whole_model

from blip2train.batch import ImageSpec
from blip2train.errors import CheckpointError, ConfigError
from blip2train.model.vision_encoder.timm_vit import TimmVisionEncoder

CLIP, EVA = FAMILIES["clip"].name, FAMILIES["eva"].name


def at(size: int) -> ImageSpec:
    return ImageSpec(size, IMAGE.mean, IMAGE.std)


def assert_loaded(encoder: TimmVisionEncoder, whole: dict[str, Tensor]) -> None:
    for key, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, whole[key]), key


def openai_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's CLIP under the names of OpenAI's image tower, which LAVIS's file has without a prefix."""
    starts = {
        "patch_embed.proj.": "conv1.", "norm_pre.": "ln_pre.", "norm.": "ln_post.", "blocks.": "transformer.resblocks.",
    }  # fmt: skip
    middles = {
        ".norm1.": ".ln_1.", ".norm2.": ".ln_2.", ".attn.qkv.": ".attn.in_proj_", ".attn.proj.": ".attn.out_proj.",
        ".mlp.fc1.": ".mlp.c_fc.", ".mlp.fc2.": ".mlp.c_proj.",
    }  # fmt: skip
    theirs = {"class_embedding": state["cls_token"][0, 0], "positional_embedding": state["pos_embed"][0]}
    theirs["proj"] = torch.randn(state["cls_token"].shape[-1], 7)
    for key, tensor in state.items():
        start = next((ours for ours in starts if key.startswith(ours)), None)
        if start is not None:
            name = starts[start] + key.removeprefix(start)
            for ours, other in middles.items():
                name = name.replace(ours, other)
            theirs[name] = tensor
    return theirs


def test_checkpoint_of_the_cut_tower_itself_loads(tmp_path: Path) -> None:
    encoder = tiny_vit()
    save_file(encoder.backbone.state_dict(), tmp_path / "cut.safetensors")
    torch.manual_seed(9)
    again = TimmVisionEncoder("vit_tiny_patch16_224", IMAGE, weights=str(tmp_path / "cut.safetensors"), layer=-1,
                              model_args=VIT_ARGS | {"depth": 2})  # fmt: skip
    assert torch.equal(again.eval()(random_images(1)), encoder.eval()(random_images(1)))


def test_an_encoder_with_weights_draws_none_of_the_random_numbers_of_the_parts_behind_it(tmp_path: Path) -> None:
    save_whole("vit_tiny_patch16_224", VIT_ARGS, tmp_path / "vit.safetensors")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    TimmVisionEncoder("vit_tiny_patch16_224", IMAGE, weights=str(tmp_path / "vit.safetensors"), model_args=VIT_ARGS)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pth_file_with_the_state_dict_under_model_loads(tmp_path: Path, zipped: bool) -> None:
    state = whole_model("vit_tiny_patch16_224", VIT_ARGS).state_dict()
    torch.save({"model": state, "epoch": 3}, tmp_path / "vit.pth", _use_new_zipfile_serialization=zipped)
    assert_loaded(tiny_vit(weights=str(tmp_path / "vit.pth")), state)


@pytest.mark.parametrize("prefix", ["visual.", ""])
def test_openais_clip_and_lavis_clip_vit_l_load(tmp_path: Path, prefix: str) -> None:
    state = whole_model(CLIP, VIT_ARGS).state_dict()
    theirs = {f"{prefix}{key}": tensor for key, tensor in openai_names(state).items()}
    if prefix:  # the text tower lies beside it in OpenAI's file
        theirs |= {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(24)}
    torch.save(theirs, tmp_path / "clip_vit_L.pth")
    assert_loaded(tiny_vit(name=CLIP, weights=str(tmp_path / "clip_vit_L.pth")), state)


def test_lavis_eva_vit_g_loads_in_half_precision_with_its_leftovers(tmp_path: Path) -> None:
    model = whole_model(EVA, VIT_ARGS)
    state = {key: tensor.half() for key, tensor in model.state_dict().items()}
    assert not [key for key in state if "k_bias" in key or key.endswith("qkv.bias")], "LAVIS has no k bias either"
    leftovers = {"head.weight": torch.zeros(1000, 24), "fc_norm.weight": torch.ones(24), "fc_norm.bias": torch.ones(24)}
    torch.save(state | leftovers, tmp_path / "eva_vit_g.pth")
    for dtype in (torch.float16, torch.float32):
        loaded = tiny_vit(name=EVA, weights=str(tmp_path / "eva_vit_g.pth"), dtype=str(dtype).removeprefix("torch."))
        assert_loaded(loaded, {key: tensor.to(dtype) for key, tensor in state.items()})


@pytest.mark.parametrize(("old", "new"), [(224, 364), (224, 490), (224, 154)])
@pytest.mark.parametrize(("name", "align_corners"), [(EVA, False), (CLIP, True), (CLIP, False)])
def test_the_position_embedding_is_resized_as_lavis_does(
    name: str, align_corners: bool, old: int, new: int, tmp_path: Path
) -> None:
    sizes = {"patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = whole_model(name, sizes, size=old)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    encoder = tiny_vit(
        name=name, image=at(new), model_args=sizes, layer=0, align_corners=align_corners,
        weights=str(tmp_path / "vit.safetensors"),
    )  # fmt: skip
    resized, original = encoder.backbone.pos_embed[0], model.pos_embed[0].detach()
    grid = original[1:].T.reshape(1, 24, old // 14, old // 14)
    expected = F.interpolate(grid, size=(new // 14, new // 14), mode="bicubic", align_corners=align_corners)
    torch.testing.assert_close(resized[1:], expected[0].flatten(1).T, rtol=0, atol=1e-6)
    assert torch.equal(resized[0], original[0]), "the class token's entry is not part of the grid"
    assert encoder.num_tokens == len(resized) == (new // 14) ** 2 + 1


@pytest.mark.parametrize("family", ["siglip", "dinov2_reg", "vit", "eva02"])
def test_another_familys_position_embedding_is_resized_without_antialiasing(family: str, tmp_path: Path) -> None:
    small = FAMILIES[family]
    model = save_whole(small.name, small.model_args, tmp_path / "vit.safetensors")
    encoder = tiny_vit(
        name=small.name, model_args=small.model_args, image=at(24), weights=str(tmp_path / "vit.safetensors")
    )
    original = model.pos_embed[0].detach()
    prefix = len(original) - 16
    grid = original[prefix:].T.reshape(1, 24, 4, 4)
    expected = F.interpolate(grid, size=(3, 3), mode="bicubic", align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(encoder.backbone.pos_embed[0, prefix:], expected, rtol=0, atol=1e-6)


def test_rotary_positions_need_no_resize(tmp_path: Path) -> None:
    small = FAMILIES["dinov3"]
    model = save_whole(small.name, small.model_args, tmp_path / "vit.safetensors")
    encoder = tiny_vit(
        name=small.name, model_args=small.model_args, image=at(48), weights=str(tmp_path / "vit.safetensors")
    )
    assert_loaded(encoder, model.state_dict())
    assert encoder(random_images(1, size=48)).shape == (1, 36 + 5, 24)


@pytest.mark.parametrize("family", ["vit", "clip", "eva", "siglip", "dinov2_reg", "dinov3"])
@pytest.mark.parametrize("size", [32, 24, 48])
def test_hub_and_local_weights_go_the_same_way(
    family: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = FAMILIES[family]
    model = save_whole(small.name, small.model_args, tmp_path / "vit.safetensors")
    asked = []

    def hub(model_id: str, *_: object, **__: object) -> dict[str, Tensor]:
        asked.append(model_id)
        return dict(model.state_dict())

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", hub)
    options: dict[str, Any] = {"name": small.name, "model_args": small.model_args, "image": at(size)}
    fetched = tiny_vit(pretrained=True, **options).backbone.state_dict()
    local = tiny_vit(weights=str(tmp_path / "vit.safetensors"), **options).backbone.state_dict()
    assert len(asked) == 1
    assert fetched.keys() == local.keys()
    assert all(torch.equal(fetched[key], local[key]) for key in local)


@pytest.mark.parametrize("name", ["flexivit_small", "vit_base_patch16_radio_v3", "vit_large_patch16_radio_v3"])
def test_families_that_timm_itself_resizes_without_antialiasing_are_resized_its_way(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {k: tensor for k, tensor in whole_model(name, VIT_ARGS).state_dict().items() if "head" not in k}
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
    theirs = timm.create_model(name, pretrained=True, img_size=48, num_classes=0, **VIT_ARGS)
    ours = tiny_vit(name=name, image=at(48), pretrained=True)
    assert torch.equal(ours.backbone.pos_embed, theirs.pos_embed)


def test_hub_weights_that_do_not_fit_are_refused_with_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    state = whole_model("vit_tiny_patch16_224", VIT_ARGS).state_dict()
    del state["blocks.1.norm1.weight"]
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: state)
    with pytest.raises(CheckpointError, match=r"missing 1 \(blocks.1.norm1.weight\)"):
        tiny_vit(pretrained=True)


def test_hub_weights_that_cannot_be_fetched_are_an_error_that_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(ConfigError, match=r"no pretrained weights for vit_tiny_patch16_224: offline"):
        tiny_vit(pretrained=True)


def test_a_name_without_any_weights_is_an_error() -> None:
    with pytest.raises(ConfigError, match="No pretrained weights exist"):
        tiny_vit(name="vit_small_patch16_18x2_224", pretrained=True)


def test_weights_that_timm_reads_past_our_account_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models.vision_transformer._load_weights", lambda *_: None)
    overlay = {"pretrained_cfg_overlay": {"file": "weights.npz", "custom_load": True}}
    with pytest.raises(ConfigError, match="in a format of their own"):
        tiny_vit(pretrained=True, model_args=VIT_ARGS | overlay)


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


OTHER_MODELS = {
    "bert": {"embeddings.word_embeddings.weight": torch.zeros(9, 4), "pooler.dense.bias": torch.zeros(4)},
    "resnet": {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)},
    "other_grid": {"pos_embed": torch.zeros(1, 12, 24), "patch_embed.proj.weight": torch.zeros(24, 3, 8, 8)},
    "no_tensors": {"epoch": 3},
    "nothing": {},
}


@pytest.mark.parametrize("family", ["vit", "clip", "eva", "beit"])
@pytest.mark.parametrize("other", OTHER_MODELS)
def test_weights_of_another_model_are_refused(family: str, other: str, tmp_path: Path) -> None:
    torch.save(OTHER_MODELS[other], tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth"):
        tiny_vit(
            name=FAMILIES[family].name, model_args=FAMILIES[family].model_args, weights=str(tmp_path / "other.pth")
        )


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    sentinel, file = tmp_path / "exploded", tmp_path / "bomb.pth"
    state = whole_model("vit_tiny_patch16_224", VIT_ARGS).state_dict()
    torch.save({"model": state, "extra": Bomb(sentinel)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"a pickle that calls \w+\.mkdir; no code of it was run") as caught:
        tiny_vit(weights=str(file))
    assert not sentinel.exists()
    assert "weights_only" not in str(caught.value), "torch's advice to run it all the same is not passed on"
    torch.load(file, weights_only=False)
    assert sentinel.exists(), "the file would have run it"


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "legacy.pth"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    state, file = whole_model("vit_tiny_patch16_224", VIT_ARGS).state_dict(), tmp_path / f"vit.{suffix}"
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=suffix == "pth")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=file.name):
        tiny_vit(weights=str(file))


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not weights")
    (tmp_path / "text.pth").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("absent.pth", "text.safetensors", "text.pth", "list.pth"):
        with pytest.raises(CheckpointError, match=name):
            tiny_vit(weights=str(tmp_path / name))
