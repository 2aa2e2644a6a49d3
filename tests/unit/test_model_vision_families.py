"""Every ViT family against timm's own `forward_intermediates`: the chosen layer, with and without the final norm."""

from pathlib import Path

import pytest
import torch
from tiny_model import random_images, tiny_vit
from vit_family import FAMILIES, normalised, save_whole


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tokens_are_timms_intermediate_of_the_chosen_layer(family: str, tmp_path: Path) -> None:
    small = FAMILIES[family]
    model = save_whole(small.name, small.model_args, tmp_path / "vit.safetensors")
    for layer, index in ((-2, 1), (-1, 2), (0, 0), (2, 2), (-3, 0)):
        for final_norm in (False, True):
            encoder = tiny_vit(
                name=small.name,
                model_args=small.model_args,
                layer=layer,
                final_norm=final_norm,
                weights=str(tmp_path / "vit.safetensors"),
            ).eval()
            expected = model.forward_intermediates(
                normalised(random_images(2)),
                indices=[index],
                norm=final_norm,
                output_fmt="NLC",
                return_prefix_tokens=True,
                intermediates_only=True,
            )[0]
            expected = torch.cat([expected[1], expected[0]], dim=1) if isinstance(expected, tuple) else expected
            tokens = encoder(random_images(2))
            assert tokens.shape == (2, encoder.num_tokens, encoder.embed_dim) == (2, 16 + small.prefix, 24)
            torch.testing.assert_close(tokens, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("trainable_blocks", "trained"), [(1, {"blocks.1"}), (2, {"blocks.0", "blocks.1"})])
def test_the_last_blocks_and_no_others_get_gradients(family: str, trainable_blocks: int, trained: set[str]) -> None:
    small = FAMILIES[family]
    encoder = tiny_vit(name=small.name, model_args=small.model_args, trainable_blocks=trainable_blocks).train()
    encoder(random_images(2)).square().mean().backward()
    reached = {name for name, parameter in encoder.backbone.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, parameter in encoder.backbone.named_parameters() if parameter.requires_grad}
    assert {".".join(name.split(".")[:2]) for name in reached} == trained


@pytest.mark.parametrize("family", FAMILIES)
def test_training_everything_reaches_every_parameter_that_is_left(family: str) -> None:
    small = FAMILIES[family]
    encoder = tiny_vit(name=small.name, model_args=small.model_args, trainable_blocks="all").train()
    (encoder(random_images(2)) * torch.randn(24, generator=torch.Generator().manual_seed(0))).sum().backward()
    gradients = {name: parameter.grad for name, parameter in encoder.backbone.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    assert {name for name in gradients if not name.startswith("blocks.")} >= {"patch_embed.proj.weight"}
    assert ("pos_embed" in gradients) == (family not in ("dinov3", "beit"))
    assert ("cls_token" in gradients) == (small.prefix > 0)
    assert not [name for name in gradients if name.startswith(("blocks.2", "norm.", "head", "fc_norm", "attn_pool"))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@torch.no_grad()
def test_half_precision_weights_give_finite_float32_tokens_near_the_full_ones(family: str, dtype: str) -> None:
    small = FAMILIES[family]
    full, half = (tiny_vit(name=small.name, model_args=small.model_args, dtype=name) for name in ("float32", dtype))
    assert {parameter.dtype for parameter in half.parameters()} == {getattr(torch, dtype)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = half(random_images(2))
    assert tokens.dtype == torch.float32 and tokens.isfinite().all()
    expected = full(random_images(2))
    error = (tokens - expected).norm() / expected.norm()
    assert error < {"float16": 5e-3, "bfloat16": 3e-2}[dtype]
