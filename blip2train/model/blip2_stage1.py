"""Stage 1: images and texts -> features in one contrastive space, matching logits, caption logits.

Implements section 3.2 (representation learning with a frozen image encoder). Holds the parts and names the steps;
losses, negatives and ranks live in objective/. `ln_vision`, kept from LAVIS for its checkpoints, is not in the paper.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2train.model.autocast import full_precision_linear
from blip2train.model.image_tokens import build_ln_vision, check_image_width, encode_raw_tokens, normalise_tokens
from blip2train.model.qformer.qformer import ImageKeysValues, QFormer, QueryStates
from blip2train.model.vision_encoder.base import VisionEncoder


class Blip2Stage1(nn.Module):
    """Vision encoder, Q-Former, and the heads of the three losses.

    Args:
        vision_encoder: an `nn.Module`; its image tokens are the Q-Former's context. Frozen, unless it says otherwise.
        qformer: with its text branch.
        contrastive_dim: width E of the contrastive space (256 in LAVIS; the paper does not say).
        temperature: initial value of the learned divisor of the similarities (0.07 in LAVIS).
        ln_vision: a trainable LayerNorm on the image tokens.
        ln_vision_eps: its epsilon; the released LAVIS weights were trained with 1e-5, transformers uses 1e-6.

    Raises:
        ConfigError: encoder and Q-Former disagree on the image width.
    """

    def __init__(
        self,
        vision_encoder: VisionEncoder,
        qformer: QFormer,
        contrastive_dim: int = 256,
        temperature: float = 0.07,
        ln_vision: bool = True,
        ln_vision_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_image_width(vision_encoder, qformer)
        self.vision_encoder = vision_encoder
        self.ln_vision = build_ln_vision(vision_encoder, ln_vision, ln_vision_eps)
        self.qformer = qformer
        self.vision_proj = nn.Linear(qformer.hidden_size, contrastive_dim)
        self.text_proj = nn.Linear(qformer.hidden_size, contrastive_dim)
        self.itm_head = nn.Linear(qformer.hidden_size, 2)
        self.temperature = nn.Parameter(torch.tensor(temperature))

    def image_tokens(self, images: Tensor) -> Tensor:
        """Encode uint8 images (B, 3, h, w), or a batch's stored tokens, and normalise the tokens (B, P, I)."""
        return self.normalise_tokens(self.raw_tokens(images))

    def raw_tokens(self, images: Tensor) -> Tensor:
        """The vision encoder's own output (B, P, I), before `ln_vision`; without a graph if the encoder is frozen."""
        return encode_raw_tokens(self.vision_encoder, images)

    def normalise_tokens(self, raw_tokens: Tensor) -> Tensor:
        """Apply `ln_vision` to raw tokens (B, P, I)."""
        return normalise_tokens(self.ln_vision, raw_tokens)

    def image_keys_values(self, image_tokens: Tensor) -> ImageKeysValues:
        """Project image tokens (B, P, I) for all cross-attentions, once for all passes that read the images."""
        return self.qformer.image_keys_values(image_tokens)

    def encode_image(self, image_tokens: Tensor | ImageKeysValues) -> QueryStates:
        """Let the queries read image tokens (B, P, I), or their keys and values."""
        return self.qformer.encode_image(image_tokens)

    def image_features(self, hidden: Tensor) -> Tensor:
        """Unit vectors (B, Q, E) of query states (B, Q, D), one per query; in float32 also under autocast."""
        return F.normalize(full_precision_linear(self.vision_proj, hidden), dim=-1)

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors (B, E) of texts (B, T), float32: the [CLS] state of a pass that sees no image."""
        hidden_BD = self.qformer.encode_text(ids, mask, rows=1)[:, 0]
        return F.normalize(full_precision_linear(self.text_proj, hidden_BD), dim=-1)

    def matching_logits(
        self,
        image_tokens: Tensor | ImageKeysValues,
        ids: Tensor,
        mask: Tensor,
        image_rows: Tensor | None = None,
        more_images: ImageKeysValues | None = None,
    ) -> Tensor:
        """Logits (B, 2), float32, of "does not match" and "matches": the two-class head averaged over the queries.

        Args:
            image_tokens: (N, P, I), or `QueryStates.image` of the same images.
            ids: (B, T).
            mask: (B, T) bool.
            image_rows: (B,) int64, the image of each text; None pairs them in order.
            more_images: keys and values of further images, which `image_rows` counts from N on.
        """
        hidden_BQD = self.qformer.fuse(image_tokens, ids, mask, image_rows, more_images)
        return full_precision_linear(self.itm_head, hidden_BQD).mean(dim=1)

    def generation_logits(self, ids: Tensor, mask: Tensor, query: QueryStates) -> Tensor:
        """Next-token logits (B, T, V) of texts (B, T) that start with [DEC], grounded in the queries' states."""
        return self.qformer.lm_logits(self.qformer.decode(ids, mask, query))
