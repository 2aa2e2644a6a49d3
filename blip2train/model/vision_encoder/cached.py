"""Stored image tokens (B, P, C) -> image tokens (B, P, I): what stands for a frozen encoder that has already run.

A frozen tower gives the same tokens for the same picture in every step (paper, section 3.1), so a feature cache holds
them and the tower itself is never built. LAVIS has no such thing.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from blip2train.batch import ImageSpec
from blip2train.errors import ConfigError
from blip2train.model.vision_encoder.token_codec import bytes_per_token, decode_tokens, token_codec


class CachedVisionEncoder(nn.Module):
    """A vision encoder without weights: it decodes what the real one has computed.

    Args:
        image: what the real encoder saw.
        num_tokens: P per image.
        embed_dim: width I.
        codec: name in `token_codec.CODECS`.

    Raises:
        ConfigError: there is no such codec.
    """

    trainable: Literal[False] = False

    def __init__(self, image: ImageSpec, num_tokens: int, embed_dim: int, codec: str) -> None:
        super().__init__()
        self.image = image
        self.num_tokens = num_tokens
        self.embed_dim = embed_dim
        self._codec = token_codec(codec)
        self.token_bytes = bytes_per_token(self._codec, embed_dim)

    def forward(self, stored_tokens: Tensor) -> Tensor:
        """Decode.

        Args:
            stored_tokens: (B, P, C) uint8.

        Returns:
            (B, P, I) float32, as an encoder gives it.

        Raises:
            ConfigError: images, or tokens of another encoder.
        """
        if tuple(stored_tokens.shape[1:]) != (self.num_tokens, self.token_bytes):
            raise ConfigError(
                f"a batch of {tuple(stored_tokens.shape)}, but the model was built for stored tokens "
                f"(B, {self.num_tokens}, {self.token_bytes})",
                where="the batch against model.vision_encoder",
                fix="a model that trains from features= takes their batches; images need the encoder itself",
            )
        return decode_tokens(stored_tokens, self._codec)
