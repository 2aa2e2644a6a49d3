"""A record of a feature cache: image tokens in the place of an image, as bytes that only the model decodes.

Such shards are ordinary ones, so order, mixture, resume and counters know nothing of them. A record that could not be
used when the cache was made keeps its place and its cause: the samples come in the order of the run without a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blip2train.errors import DataError

TOKENS = "tokens"
"""Extension of the tokens: P rows of C bytes (see `model/vision_encoder/token_codec.py`)."""
DROPPED = "dropped"
"""Extension of what stands for an unusable record: JSON, [cause, detail]."""


@dataclass(frozen=True, slots=True)
class StoredTokens:
    """What a dataset of a feature cache has instead of a transform.

    Args:
        num_tokens: P per image.
        token_bytes: C per token.
    """

    num_tokens: int
    token_bytes: int

    def read(self, data: bytes) -> Tensor:
        """The bytes of one record as uint8 (P, C); DataError if there are more or fewer."""
        expected = self.num_tokens * self.token_bytes
        if len(data) != expected:
            raise DataError(
                f"{len(data)} bytes of image tokens, {expected} expected",
                where="StoredTokens.read",
                fix="make the cache again with `blip2train data cache-features`",
            )
        # bytearray: torch warns about read-only memory
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(self.num_tokens, self.token_bytes)
