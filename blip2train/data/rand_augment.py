"""uint8 (3, h, w) -> uint8 (3, h, w): random colour and geometry changes after crop and flip, an option of a dataset.

The paper says crop and flip (section 3.4) and no more; LAVIS adds this to Visual Genome alone. Same operations and
strengths as LAVIS's, on torchvision's kernels: LAVIS's own are OpenCV's, which round a pixel's position to 1/32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from blip2train.errors import ConfigError

OPERATIONS = (
    "identity",
    "auto_contrast",
    "brightness",
    "sharpness",
    "equalize",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
)
"""LAVIS's ten, each doing what it is called."""

AUTO_CONTRAST_LAVIS = "auto_contrast_lavis"
"""What LAVIS's code makes of auto-contrast: see `_auto_contrast_lavis`."""

MAX_MAGNITUDE = 10.0
APPLY_PROBABILITY = 0.5
GREY = 128.0
"""What moves in from outside the picture."""

_MAX_SHEAR, _MAX_TRANSLATE_PIXELS, _MAX_DEGREES = 0.3, 10.0, 30.0


class RandAugment:
    """Draw `num_ops` operations, with replacement, and apply each with probability one half.

    Args:
        num_ops: operations drawn per image (LAVIS: 2).
        magnitude: strength from 0 to 10 (LAVIS: 5). Sign of shears, shifts and rotations is drawn. Brightness and
            sharpness change nothing at 5, where their factor is 1: below they darken and blur, above the reverse.
        operations: names to draw from: of `OPERATIONS`, and `AUTO_CONTRAST_LAVIS`. One drawn twice is applied twice.
    """

    def __init__(self, num_ops: int = 2, magnitude: float = 5.0, operations: Sequence[str] = OPERATIONS) -> None:
        if num_ops < 1 or not 0 <= magnitude <= MAX_MAGNITUDE:
            raise ConfigError(
                f"num_ops {num_ops}, magnitude {magnitude}",
                where="RandAugment",
                fix="give at least one operation and a magnitude from 0 to 10; LAVIS: 2 and 5",
            )
        unknown = sorted(set(operations) - {*OPERATIONS, AUTO_CONTRAST_LAVIS})
        if unknown or not operations:
            raise ConfigError(
                f"operations {unknown or 'none'}",
                where="RandAugment.operations",
                fix=f"choose from {', '.join((*OPERATIONS, AUTO_CONTRAST_LAVIS))}",
            )
        self.num_ops = num_ops
        self.magnitude = float(magnitude)
        self.operations = tuple(operations)

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Change (3, h, w) uint8; the number of draws is fixed, so what is drawn afterwards never depends on them."""
        for choice, chance, sign in torch.rand(self.num_ops, 3, generator=generator).tolist():
            if chance < APPLY_PROBABILITY:
                name = self.operations[int(choice * len(self.operations))]
                image = apply_operation(image, name, self.magnitude, negative=sign < 0.5)
        return image


def apply_operation(image: Tensor, name: str, magnitude: float, *, negative: bool = False) -> Tensor:
    """One operation on a uint8 image (3, h, w); each colour plane by itself.

    Args:
        image: what is changed; never written to.
        name: of the operation; `identity` changes nothing.
        magnitude: 0 to 10.
        negative: turn the direction of a shear, shift or rotation around.
    """
    share = magnitude / MAX_MAGNITUDE
    signed = -share if negative else share
    factor = 1.8 * share + 0.1
    height, width = image.shape[-2:]
    changed: Tensor = image
    match name:
        case "auto_contrast":
            changed = F.autocontrast(image)
        case "auto_contrast_lavis":
            changed = _auto_contrast_lavis(image)
        case "brightness":
            changed = F.adjust_brightness(image, factor)
        case "sharpness" if factor != 1.0:  # the slowest of all, for nothing
            changed = F.adjust_sharpness(image, factor)
        case "equalize":
            changed = F.equalize(image)
        case "shear_x":
            changed = _move(image, shear=(_MAX_SHEAR * signed, 0.0))
        case "shear_y":
            changed = _move(image, shear=(0.0, _MAX_SHEAR * signed))
        case "translate_x":
            changed = _move(image, translate=(-_MAX_TRANSLATE_PIXELS * signed, 0.0))
        case "translate_y":
            changed = _move(image, translate=(0.0, -_MAX_TRANSLATE_PIXELS * signed))
        case "rotate":
            changed = _move(image, degrees=_MAX_DEGREES * signed, center=(width / 2 + 0.5, height / 2 + 0.5))
    return changed


def _auto_contrast_lavis(image: Tensor) -> Tensor:
    """Auto-contrast where a plane has a black pixel; any other plane turns white.

    LAVIS negates the smallest value as an unsigned byte, so -5 is 251 and every pixel lands beyond the brightest.
    """
    stretched: Tensor = F.autocontrast(image)
    smallest_311, largest_311 = image.amin(dim=(1, 2), keepdim=True), image.amax(dim=(1, 2), keepdim=True)
    return torch.where((smallest_311 > 0) & (largest_311 > smallest_311), torch.full_like(image, 255), stretched)


def _move(
    image: Tensor,
    *,
    shear: tuple[float, float] = (0.0, 0.0),
    translate: tuple[float, float] = (0.0, 0.0),
    degrees: float = 0.0,
    center: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """Bilinear affine map of the picture, grey outside.

    Args:
        shear: columns per row and rows per column by which the picture is sheared.
        translate: pixels to the right and down.
        degrees: counter-clockwise.
        center: (x, y) of the fixed point, the middle of the first pixel being (0.5, 0.5): where OpenCV counts from.
    """
    # torchvision blends a fill colour into pixels at the edge twice; zero is exact, so grey is moved to zero and back
    moved: Tensor = F.affine(
        image.to(torch.float32) - GREY,
        angle=-degrees,
        translate=list(translate),
        scale=1.0,
        shear=[-math.degrees(math.atan(value)) for value in shear],
        interpolation=InterpolationMode.BILINEAR,
        center=list(center),
    )
    return (moved + GREY).round_().clamp_(0, 255).to(torch.uint8)
