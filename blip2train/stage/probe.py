"""Sizes -> a batch of zeros as the collators shape it: to run a step for its memory, or for what it reaches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip2train.batch import Stage1Batch, Stage2Batch
from blip2train.model.vision_encoder.cached import CachedVisionEncoder


def empty_stage1_batch(encoder: Any, pairs: int, tokens: int) -> Stage1Batch:
    """A batch for stage 1.

    Args:
        encoder: the model's vision encoder; one that reads stored tokens gets those.
        pairs: images and texts B, of as many different images.
        tokens: length of every text.
    """
    pixels, stored = _images(encoder, pairs)
    return Stage1Batch(pixels, *_text(pairs, tokens), torch.arange(pairs), [""] * pairs, stored)


def empty_stage2_batch(encoder: Any, pairs: int, prompt_tokens: int, tokens: int) -> Stage2Batch:
    """A batch for stage 2; see `empty_stage1_batch`. Prompts may have 0 tokens."""
    pixels, stored = _images(encoder, pairs)
    return Stage2Batch(pixels, *_text(pairs, prompt_tokens), *_text(pairs, tokens), [""] * pairs, stored)


def _images(encoder: Any, pairs: int) -> tuple[Tensor | None, Tensor | None]:
    """Pixels or stored tokens, whichever the encoder reads."""
    if isinstance(encoder, CachedVisionEncoder):
        return None, torch.zeros(pairs, encoder.num_tokens, encoder.token_bytes, dtype=torch.uint8)
    side = encoder.image.size
    return torch.zeros(pairs, 3, side, side, dtype=torch.uint8), None


def _text(pairs: int, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(pairs, tokens, dtype=torch.int64), torch.ones(pairs, tokens, dtype=torch.bool)
