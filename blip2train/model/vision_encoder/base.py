"""What the rest of the package knows of a vision encoder: pixels (B, 3, h, w) in, image tokens (B, P, I) out.

The paper takes any frozen ViT (section 3.1); an encoder that is not in timm joins by fulfilling this protocol.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from blip2train.batch import ImageSpec


class VisionEncoder(Protocol):
    """An `nn.Module` that turns images into tokens; it knows the image it wants and the tokens it gives."""

    @property
    def image(self) -> ImageSpec:
        """What the transforms must deliver."""
        ...

    @property
    def embed_dim(self) -> int:
        """Width I of an image token."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens P per image, class and register tokens included."""
        ...

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Encode uint8 (B, 3, h, w), normalising inside, to (B, P, I)."""
        ...
