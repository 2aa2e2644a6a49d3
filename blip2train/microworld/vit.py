"""Image (B, 3, h, w) -> patch tokens (B, P, I) by convolutions: the stem of the micro-world's timm ViT.

Implements the early convolutions of Xiao et al. (arXiv 2106.14881), which make a ViT of three blocks learn shapes in a
minute where one linear map per patch fails. It fits timm's `embed_layer`; LAVIS has no counterpart.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ConvStem(nn.Module):
    """Stride-2 convolutions down to one token per patch; takes what timm passes to an `embed_layer`.

    Use it as `timm.create_model("vit_tiny_patch16_224", embed_layer=ConvStem, img_size=64, embed_dim=96, depth=3,
    num_heads=4, num_classes=0)`; `forward_features` then gives the class token and 16 patch tokens.

    Args:
        img_size: side of the square input in pixels.
        patch_size: side of a patch; a power of two.
        in_chans: input channels.
        embed_dim: I, the width of a token.
        bias: bias of the last projection.
        timm_options: timm's further options; only those that ask for what this stem does anyway are accepted.
    """

    def __init__(
        self,
        img_size: int = 64,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 96,
        bias: bool = True,
        **timm_options: Any,
    ) -> None:
        super().__init__()
        known = {
            "dynamic_img_pad": False,
            "strict_img_size": True,
            "flatten": True,
            "norm_layer": None,
            "device": None,
            "dtype": None,
        }
        refused = {name: value for name, value in timm_options.items() if name not in known or value != known[name]}
        assert not refused, f"ConvStem cannot do {refused}"
        assert patch_size & (patch_size - 1) == 0 and img_size % patch_size == 0, "patches tile the image"
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        side = img_size // patch_size
        self.grid_size, self.num_patches = (side, side), side * side
        num_halvings = patch_size.bit_length() - 1
        widths = [max(16, embed_dim * (level + 1) // num_halvings) for level in range(num_halvings)]
        layers: list[nn.Module] = []
        for width_in, width in zip([in_chans, *widths[:-1]], widths, strict=True):
            layers += [
                nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(1, width),
                nn.GELU(),
            ]
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(widths[-1], embed_dim, 1, bias=bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed normalised images (B, 3, h, w) as (B, P, I), row by row."""
        height, width = pixels.shape[-2:]
        assert (height, width) == self.img_size, f"{height}x{width} pixels in a stem for {self.img_size}"
        tokens: Tensor = self.proj(self.stem(pixels))
        return tokens.flatten(2).transpose(1, 2)
