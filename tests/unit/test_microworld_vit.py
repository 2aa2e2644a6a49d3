"""The conv stem: an ordinary timm ViT through timm's own factory and through the project's door."""

import pytest
import timm
import torch

from blip2train.batch import ImageSpec
from blip2train.microworld.backbone import ASSETS
from blip2train.microworld.pretrain_image import CELL_OF_PATCH, EMPTY, DenseHeads, build_vit, dense_targets, draw_batch
from blip2train.microworld.scene import SHAPES, Scene, SceneObject, WorldSpec, sample_scene
from blip2train.microworld.vit import ConvStem
from blip2train.model.vision_encoder.timm_vit import TimmVisionEncoder


def test_timm_builds_it_with_a_class_token_and_sixteen_patches() -> None:
    vit = build_vit()
    assert isinstance(vit, timm.models.VisionTransformer)
    assert vit.forward_features(torch.zeros(2, 3, 64, 64)).shape == (2, 17, 96)
    assert sum(parameter.numel() for parameter in vit.parameters()) == 451_560


@pytest.mark.parametrize(("top", "left", "patch"), [(0, 0, 0), (0, 48, 3), (48, 0, 12), (32, 16, 9)])
def test_patch_tokens_follow_the_image_row_by_row(top: int, left: int, patch: int) -> None:
    torch.manual_seed(0)
    stem = ConvStem(norm_layer=None)
    stem.stem = torch.nn.Sequential(*(layer for layer in stem.stem if isinstance(layer, torch.nn.Conv2d)))  # linear
    image = torch.zeros(1, 3, 64, 64, requires_grad=True)
    stem(image).sum(dim=(0, 2))[patch].backward()
    assert image.grad is not None
    rows, columns = torch.nonzero(image.grad[0].abs().sum(dim=0), as_tuple=True)
    # each token reads its own patch and 15 pixels before it: four convolutions of 3 with stride 2
    assert (int(rows.min()), int(rows.max())) == (max(0, top - 15), top + 15)
    assert (int(columns.min()), int(columns.max())) == (max(0, left - 15), left + 15)


@pytest.mark.parametrize("options", [{"norm_layer": torch.nn.LayerNorm}, {"dynamic_img_pad": True}, {"unheard": 1}])
def test_options_it_cannot_honour_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(AssertionError, match="cannot do"):
        ConvStem(**options)  # type: ignore[arg-type]


def test_dense_targets_name_the_object_under_each_patch() -> None:
    scene = Scene((SceneObject("star", "red", "small", "plain", "bottom-left"),), "white", 0)
    labels = dense_targets(scene)
    assert labels["shape"][12] == SHAPES.index("star")
    assert [index for index, shape in enumerate(labels["shape"]) if shape != EMPTY] == [12]
    centre = dense_targets(Scene((SceneObject("ring", "red", "small", "plain", "center"),), "white", 0))
    assert [index for index, shape in enumerate(centre["shape"]) if shape != EMPTY] == [5, 6, 9, 10]
    assert len(labels["where"]) == len(CELL_OF_PATCH) ** 2


def test_heads_give_one_prediction_per_patch_and_per_image() -> None:
    spec = WorldSpec()
    pixels = draw_batch(spec, [sample_scene(spec, "all", index) for index in range(3)])
    logits = DenseHeads(build_vit())(pixels)
    assert logits["shape"].shape == (3, 16, 7) and logits["bg"].shape == (3, 4) and logits["count"].shape == (3, 3)


def test_the_projects_door_loads_the_shipped_weights_and_normalises_as_in_training() -> None:
    image = ImageSpec(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    encoder = TimmVisionEncoder(
        name="vit_tiny_patch16_224",
        image=image,
        layer=-1,
        final_norm=True,
        weights=str(ASSETS / "vit" / "model.safetensors"),
        embed_dim=96,
        model_args={"patch_size": 16, "embed_dim": 96, "depth": 3, "num_heads": 4, "embed_layer": ConvStem},
    ).eval()
    spec = WorldSpec()
    pixels = draw_batch(spec, [sample_scene(spec, "all", index) for index in range(2)])
    from blip2train.microworld.backbone import load

    vit, _ = load("vit", spec, ASSETS / "vit")
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), vit.forward_features(pixels.float() / 127.5 - 1.0))
