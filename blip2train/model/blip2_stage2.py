"""Stage 2: images -> a visual prompt (B, Q, L) -> the frozen language model's logits for the text.

Implements section 3.3 (generative learning from a frozen LLM): the Q-Former without its text branch and one linear
projection train. As LAVIS, but the LLM stays in eval mode unless told otherwise, and one class serves every LLM.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip2train.batch import Stage2Batch
from blip2train.model.image_tokens import build_ln_vision, check_image_width, encode_image_tokens
from blip2train.model.language_model.base import GenerationSettings, LanguageModel, LanguageModelOutput
from blip2train.model.qformer.qformer import QFormer
from blip2train.model.vision_encoder.base import VisionEncoder


class Blip2Stage2(nn.Module):
    """Vision encoder, Q-Former, projection, frozen language model.

    Args:
        vision_encoder: an `nn.Module`, as in stage 1. Frozen, unless it says otherwise.
        qformer: loses its text branch here (`drop_text_branch`).
        language_model: an `nn.Module` that freezes itself; an adapter of it may train.
        ln_vision: a trainable LayerNorm on the image tokens.
        ln_vision_eps: its epsilon; the released LAVIS weights were trained with 1e-5, transformers uses 1e-6.

    Raises:
        ConfigError: encoder and Q-Former disagree on the image width.
    """

    def __init__(
        self,
        vision_encoder: VisionEncoder,
        qformer: QFormer,
        language_model: LanguageModel,
        ln_vision: bool = True,
        ln_vision_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_image_width(vision_encoder, qformer)
        qformer.drop_text_branch()
        self.vision_encoder = vision_encoder
        self.ln_vision = build_ln_vision(vision_encoder, ln_vision, ln_vision_eps)
        self.qformer = qformer
        self.projection = nn.Linear(qformer.hidden_size, language_model.embed_dim)
        self.language_model = language_model

    def visual_prompt(self, images: Tensor) -> Tensor:
        """Turn uint8 images (B, 3, h, w), or a batch's stored tokens, into soft prompts (B, Q, L)."""
        tokens_BPI = encode_image_tokens(self.vision_encoder, self.ln_vision, images)
        prompt_BQL: Tensor = self.projection(self.qformer.encode_image(tokens_BPI).hidden)
        return prompt_BQL

    def forward(self, batch: Stage2Batch) -> LanguageModelOutput:
        """Predict the batch's targets from its images and prompts; logits (B, T', V) and targets come aligned."""
        return self.language_model(self.visual_prompt(batch.images), batch)

    @torch.no_grad()
    def generate(
        self, pixel_values: Tensor | None, prompt_ids: Tensor, prompt_mask: Tensor, settings: GenerationSettings
    ) -> Tensor:
        """Generate text for images.

        Args:
            pixel_values: (B, 3, h, w) uint8, or None for no image at all (the blind baseline).
            prompt_ids: (B, Tp); Tp may be 0 with images.
            prompt_mask: (B, Tp) bool; padding on either side.
            settings: how to decode.

        Returns:
            New ids only (B, T), padded after each row's end token.
        """
        prompt_BQL = None if pixel_values is None else self.visual_prompt(pixel_values)
        return self.language_model.generate(prompt_BQL, prompt_ids, prompt_mask, settings)
