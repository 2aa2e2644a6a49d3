"""What the rest of the package knows of a vision encoder: pixels (B, 3, h, w) in, image tokens (B, P, I) out.

The paper takes any frozen ViT (section 3.1); an encoder that is not in timm joins by fulfilling this protocol. LAVIS
freezes the encoder from outside, by replacing its `train` method; here an encoder knows which of its blocks train.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from blip2train.batch import ImageSpec


class VisionEncoder(Protocol):
    """An `nn.Module` that turns images into tokens; it knows the image it wants and the tokens it gives.

    It freezes itself: what does not train requires no gradient and stays in eval mode, whatever `train()` asks for.
    """

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

    @property
    def trainable(self) -> bool:
        """Whether any of it trains; if not, it runs without a graph."""
        ...

    def __call__(self, images: Tensor, /) -> Tensor:
        """Encode uint8 (B, 3, h, w), normalising inside, to (B, P, I); `CachedVisionEncoder` takes stored tokens."""
        ...
