"""The timm adapter against transformers' own vision models: same weights, same pixels, the same block's output.

Every family that transformers has too: CLIP (QuickGELU), EVA as BLIP-2 uses it, SigLIP, DINOv2 with registers and
without, DINOv3, and the plain ViT. Names are mapped here, in the test, not by the code under test.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from tiny_model import random_images, tiny_vit
from torch import Tensor, nn
from vit_family import normalised

from blip2train.model.vision_encoder.timm_vit import TimmVisionEncoder

SIZES = {
    "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
VIT_ARGS = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 4.0}
State = dict[str, Tensor]

BLOCK = [
    (r".*layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.(layer_norm1|layernorm_before)\.", ".norm1."),
    (r"\.(layer_norm2|layernorm_after)\.", ".norm2."),
    (r"\.(self_attn|attention)\.", ".attn."),
    (r"\.attn\.(out_proj|o_proj|projection)\.", ".attn.proj."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"),
]
"""A block's names in any of transformers' ViTs -> timm's vision_transformer."""


def blocks(state: State) -> State:
    """The blocks under timm's names; query, key and value apart as transformers has them."""
    named = {}
    for key, tensor in state.items():
        if re.match(r".*layers?\.\d+\.", key):
            for pattern, replacement in BLOCK:
                key = re.sub(pattern, replacement, key)
            named[key] = tensor
    return named


def fuse(state: State) -> State:
    """Query, key and value rows as one matrix `qkv`; a key without a bias gets zeros."""
    fused = {key: tensor for key, tensor in state.items() if not re.search(r"\.[qkv]_proj\.", key)}
    for key in [key for key in state if ".q_proj." in key]:
        parts = [
            state.get(key.replace("q_proj", part), torch.zeros_like(state[key]))
            for part in ("q_proj", "k_proj", "v_proj")
        ]
        fused[key.replace("q_proj", "qkv")] = torch.cat(parts)
    return fused


def clip(state: State) -> State:
    return fuse(blocks(state)) | {
        "cls_token": state["embeddings.class_embedding"][None, None],
        "pos_embed": state["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
        "norm_pre.weight": state["pre_layrnorm.weight"],
        "norm_pre.bias": state["pre_layrnorm.bias"],
    }


def eva(state: State) -> State:
    named = blocks(state)
    for key in [key for key in named if key.endswith("qkv.bias")]:
        query, middle, value = named.pop(key).chunk(3)
        assert not middle.any(), "EVA's keys have no bias"
        named |= {key.replace("qkv.bias", "q_bias"): query, key.replace("qkv.bias", "v_bias"): value}
    return named | {
        "cls_token": state["embeddings.class_embedding"],
        "pos_embed": state["embeddings.position_embedding"],
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embedding.bias"],
    }


def siglip(state: State) -> State:
    return fuse(blocks({key: t for key, t in state.items() if not key.startswith("head.")})) | {
        "pos_embed": state["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embedding.bias"],
    }


def plain(state: State) -> State:
    named = fuse(blocks(state)) | {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
    }
    if "embeddings.register_tokens" in state:  # timm adds the class token's position to the token itself
        position = named["pos_embed"]
        named |= {"cls_token": named["cls_token"] + position[:, :1], "pos_embed": position[:, 1:]}
        named["reg_token"] = state["embeddings.register_tokens"]
    return named


def dinov3(state: State) -> State:
    named = {re.sub(r"\.ls(\d)\.gamma", r".gamma_\1", key): tensor for key, tensor in fuse(blocks(state)).items()}
    for key in [key for key in named if key.endswith("qkv.bias")]:
        query, _, value = named.pop(key).chunk(3)
        named |= {key.replace("qkv.bias", "q_bias"): query, key.replace("qkv.bias", "v_bias"): value}
    return named | {
        "cls_token": state["embeddings.cls_token"],
        "reg_token": state["embeddings.register_tokens"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.bias"],
    }


@dataclass(frozen=True)
class Pair:
    """A transformers class with its config, timm's name for the same network, and the map between their weights."""

    theirs: str
    config: str
    ours: str
    to_timm: Callable[[State], State]
    config_args: dict[str, Any]
    model_args: dict[str, Any]


PAIRS = {
    "clip": Pair("CLIPVisionModel", "CLIPVisionConfig", "vit_large_patch14_clip_quickgelu_224", clip,
                 {"hidden_act": "quick_gelu"}, {}),
    "eva": Pair("Blip2VisionModel", "Blip2VisionConfig", "eva_giant_patch14_clip_224", eva, {}, {}),
    "siglip": Pair("SiglipVisionModel", "SiglipVisionConfig", "vit_so400m_patch14_siglip_224", siglip, {},
                   {"act_layer": "gelu_tanh"}),
    "dinov2": Pair("Dinov2Model", "Dinov2Config", "vit_small_patch14_dinov2", plain, {}, {}),
    "dinov2_reg": Pair("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "vit_small_patch14_reg4_dinov2",
                       plain, {}, {}),
    "dinov3": Pair("DINOv3ViTModel", "DINOv3ViTConfig", "vit_small_patch16_dinov3_qkvb", dinov3,
                   {"num_register_tokens": 4}, {}),
    "vit": Pair("ViTModel", "ViTConfig", "vit_base_patch16_224", plain, {"layer_norm_eps": 1e-6}, {}),
}  # fmt: skip


def their_model(pair: Pair) -> nn.Module:
    """transformers' model with weights large enough that every path shows; EVA's key biases stay zero. Seeded."""
    torch.manual_seed(0)
    config = getattr(transformers, pair.config)(**SIZES, **pair.config_args)
    model = getattr(transformers, pair.theirs)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if pair.to_timm is eva and name.endswith("qkv.bias"):
                parameter[24:48] = 0
    return model


def their_blocks(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Output of each block, caught by hooks."""
    outputs: list[Tensor] = []
    layers = [module for name, module in model.named_modules() if re.fullmatch(r".*layers?\.\d+", name)]
    handles = [
        layer.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    model(pixel_values=pixels)
    for handle in handles:
        handle.remove()
    return outputs


def our_encoder(pair: Pair, state: State, dtype: torch.dtype, **changes: Any) -> TimmVisionEncoder:
    encoder = tiny_vit(name=pair.ours, model_args=VIT_ARGS | pair.model_args, **changes).eval().to(dtype)
    kept = {key: tensor for key, tensor in pair.to_timm(state).items() if key in encoder.backbone.state_dict()}
    encoder.backbone.load_state_dict(kept)
    return encoder


@pytest.mark.parametrize("family", PAIRS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@torch.no_grad()
def test_the_chosen_layer_is_that_block_of_transformers(family: str, dtype: torch.dtype, tolerance: float) -> None:
    pair = PAIRS[family]
    theirs = their_model(pair).to(dtype)
    expected = their_blocks(theirs, normalised(random_images(2)).to(dtype))
    assert len(expected) == 3
    for layer, index in ((-2, 1), (-1, 2), (0, 0)):
        tokens = our_encoder(pair, theirs.state_dict(), dtype, layer=layer)(random_images(2))
        assert tokens.dtype == dtype
        error = (tokens - expected[index]).abs().max() / expected[index].abs().max()
        assert error < tolerance, f"layer {layer}: {error}"


@torch.no_grad()
def test_clips_second_last_hidden_state_is_layer_minus_two() -> None:
    theirs = their_model(PAIRS["clip"])
    states = theirs(pixel_values=normalised(random_images(2)), output_hidden_states=True).hidden_states
    tokens = our_encoder(PAIRS["clip"], theirs.state_dict(), torch.float32, layer=-2)(random_images(2))
    torch.testing.assert_close(tokens, states[-2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "wrong"), [("clip", "vit_large_patch14_clip_224"), ("siglip", None)])
@torch.no_grad()
def test_the_wrong_activation_is_seen_by_the_oracle(family: str, wrong: str | None) -> None:
    pair = PAIRS[family]
    theirs = their_model(pair)
    expected = their_blocks(theirs, normalised(random_images(2)))[1]
    other = Pair(pair.theirs, pair.config, wrong or pair.ours, pair.to_timm, pair.config_args, {})
    error = (our_encoder(other, theirs.state_dict(), torch.float32)(random_images(2)) - expected).abs().max()
    assert error / expected.abs().max() > 1e-5, "timm's default for this name computes something else"
