"""Pixels (B, 3, h, w) -> image tokens (B, P, I) as both stages give them to the Q-Former: encoder, ln_vision.

The paper gives the encoder's output to the Q-Former as it is; `ln_vision` is LAVIS's. LAVIS runs the frozen tower with
autograd on and casts its float32 output anew in every cross-attention layer; here it is cast once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip2train.errors import ConfigError
from blip2train.model.qformer.qformer import QFormer
from blip2train.model.vision_encoder.base import VisionEncoder


def check_image_width(vision_encoder: VisionEncoder, qformer: QFormer) -> None:
    """Raise a ConfigError if the Q-Former was built for another encoder."""
    if vision_encoder.embed_dim != qformer.image_dim:
        raise ConfigError(
            f"image tokens are {vision_encoder.embed_dim} wide, the Q-Former was built for {qformer.image_dim}",
            where="model.qformer.image_dim",
            fix=f"set it to the vision encoder's embed_dim, {vision_encoder.embed_dim}",
        )


def build_ln_vision(vision_encoder: VisionEncoder, wanted: bool, eps: float) -> nn.Module:
    """A trainable LayerNorm over the image tokens, or nothing; eps 1e-5 in LAVIS's weights, 1e-6 in transformers."""
    return nn.LayerNorm(vision_encoder.embed_dim, eps=eps) if wanted else nn.Identity()


def encode_image_tokens(vision_encoder: VisionEncoder, ln_vision: nn.Module, images: Tensor) -> Tensor:
    """Encode images and apply `ln_vision`: (B, 3, h, w) -> (B, P, I)."""
    return normalise_tokens(ln_vision, encode_raw_tokens(vision_encoder, images))


def encode_raw_tokens(vision_encoder: VisionEncoder, images: Tensor) -> Tensor:
    """Encode images (B, 3, h, w), without a graph if the encoder is frozen, to its own output (B, P, I)."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and vision_encoder.trainable):
        return vision_encoder(images)


def normalise_tokens(ln_vision: nn.Module, raw_tokens: Tensor) -> Tensor:
    """Apply `ln_vision` to an encoder's output (B, P, I), in the number format that the Q-Former reads."""
    parameter = next(ln_vision.parameters(), None)
    tokens_BPI: Tensor = ln_vision(raw_tokens if parameter is None else raw_tokens.to(parameter.dtype))
    device = tokens_BPI.device.type
    # one cast here instead of two per cross-attention layer, each of which autograd would keep
    return tokens_BPI.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tokens_BPI
