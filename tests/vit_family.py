"""Small versions of timm's ViT families: each keeps the code path of its family and builds in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from tiny_model import IMAGE, VIT_ARGS
from torch import Tensor, nn

from blip2train.batch import ImageSpec


@dataclass(frozen=True)
class Family:
    """A timm name, what makes it small, and what stands before its patch tokens."""

    name: str
    prefix: int = 1
    model_args: dict[str, Any] = field(default_factory=lambda: VIT_ARGS)


FAMILIES = {
    "vit": Family("vit_tiny_patch16_224"),
    "clip": Family("vit_large_patch14_clip_quickgelu_224"),
    "eva": Family("eva_giant_patch14_clip_224"),
    "eva02": Family("eva02_tiny_patch14_224", model_args=VIT_ARGS | {"global_pool": ""}),
    "beit": Family("beit_base_patch16_224", model_args=VIT_ARGS | {"global_pool": ""}),
    "deit": Family("deit_tiny_distilled_patch16_224", prefix=2),
    "siglip": Family("vit_so400m_patch14_siglip_224", prefix=0, model_args=VIT_ARGS | {"mlp_ratio": 2.0}),
    "siglip2": Family("vit_so400m_patch16_siglip_256", prefix=0, model_args=VIT_ARGS | {"mlp_ratio": 2.0}),
    "dinov2": Family("vit_small_patch14_dinov2"),
    "dinov2_reg": Family("vit_small_patch14_reg4_dinov2", prefix=5),
    "dinov3": Family("vit_small_patch16_dinov3", prefix=5),
    "gap": Family("vit_base_patch16_gap_224", prefix=0),
}
"""Registers, rotary positions, layer scale, attention pooling, no class token, two of them, SwiGLU: all are here."""


def whole_model(name: str, model_args: dict[str, Any], size: int = 32) -> nn.Module:
    """timm's network with head and all blocks; normalisation layers and layer scales are made non-trivial; seeded."""
    torch.manual_seed(3)
    model = timm.create_model(name, img_size=size, num_classes=7, **model_args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_whole(name: str, model_args: dict[str, Any], path: Path) -> nn.Module:
    """`whole_model`, its weights written to `path`."""
    model = whole_model(name, model_args)
    save_file(model.state_dict(), path)
    return model


def normalised(pixels: Tensor, spec: ImageSpec = IMAGE) -> Tensor:
    """What an encoder computes of uint8 pixels first."""
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    return (pixels / 255 - mean) / std
