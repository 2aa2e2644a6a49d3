"""Encoded image -> uint8 (3, h, w) -> uint8 (3, size, size): the decode and augment arrows of the data path.

Implements the pre-processing of BLIP-2 (paper section 3.4: random resized crop and horizontal flip at 224). LAVIS
works on PIL images and normalises in the loader; here tensors stay uint8 (2.2 times faster per core, a quarter of the
bytes to the device) and the vision encoder normalises. Like LAVIS, an alpha channel is dropped, not composited. Unlike
LAVIS, EXIF orientation is applied: a photograph that a phone took upright is seen upright, as its caption's author saw
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as decode_bytes
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from blip2train.batch import ImageSpec
from blip2train.data.image_file import MAX_PIXELS, ImageTooLargeError, check_size, decode_with_pil, plain_size
from blip2train.errors import ConfigError, DataError

Transform = Callable[[Tensor, torch.Generator | None], Tensor]
"""uint8 (3, h, w) and a generator -> uint8 (3, size, size)."""

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""uint8 (3, size, size) -> the same shape."""

_CROP_ATTEMPTS = 10
_FILTERS = {mode.value: mode for mode in InterpolationMode}


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image file to RGB uint8 (3, h, w): the first frame, upright, without its alpha channel.

    JPEG, PNG and still WebP take torchvision's decoders, everything else PIL (GIF, BMP, TIFF, AVIF, JPEG 2000, and
    what torchvision refuses). Of 16 bits the high byte is kept; PIL clips 16-bit grey to white instead.

    Args:
        data: the file's bytes.
        max_pixels: width x height that is still decoded, judged by the header.

    Raises:
        ImageTooLargeError: more pixels than `max_pixels`.
        DataError: the bytes are empty, truncated or no image.
    """
    size = plain_size(data)
    if size is not None:
        check_size(size, max_pixels)
        try:
            # bytearray: torch warns about read-only memory
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image: Tensor = decode_bytes(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        except (RuntimeError, ValueError):
            pass  # PIL has the last word, and the better error
        else:
            return (image.to(torch.int32) >> 8).to(torch.uint8) if image.dtype == torch.uint16 else image
    try:
        return decode_with_pil(data, max_pixels)
    except ImageTooLargeError:
        raise
    except Exception as error:  # broken bytes make PIL raise nearly anything
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no known format" if unknown else (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"image bytes that do not decode ({len(data)} bytes: {reason})",
            where="decode_image",
            fix="re-encode the file as JPEG or PNG, or remove it",
        ) from error


class EvalTransform:
    """Resize to a square without cropping or keeping the aspect ratio, as every BLIP-2 evaluation does.

    Args:
        spec: size and filter; mean and std are the vision encoder's business.
    """

    def __init__(self, spec: ImageSpec) -> None:
        self.spec = spec
        self._filter = _interpolation(spec)

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Resize (3, h, w) to (3, size, size); nothing is random, the generator is not touched."""
        size = [self.spec.size, self.spec.size]
        if list(image.shape[-2:]) == size:
            return image
        return resize(image, size, self._filter)


class TrainTransform:
    """Random resized crop, then a horizontal flip with probability one half, then `augment`.

    Args:
        spec: size and filter.
        scale: range of the crop's share of the image area (paper: not stated; LAVIS and its released configs: 0.5 to
            1).
        ratio: range of the crop's width / height.
        horizontal_flip: switch off where captions speak of left and right.
        augment: further changes, `RandAugment` for one; None for none (paper).
    """

    def __init__(
        self,
        spec: ImageSpec,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: bool = True,
        augment: Augment | None = None,
    ) -> None:
        low, high = scale
        if not 0 < low <= high <= 1:
            raise ConfigError(
                f"crop scale ({low}, {high})",
                where="TrainTransform.scale",
                fix="give shares of the area, 0 < low <= high <= 1",
            )
        self.spec = spec
        self.scale = (float(low), float(high))
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.horizontal_flip = horizontal_flip
        self.augment = augment
        self._filter = _interpolation(spec)

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Make (3, size, size) of (3, h, w); every draw is from `generator`, which must be given."""
        assert generator is not None, "training augmentation never uses the global generator"
        height, width = image.shape[-2:]
        top, left, crop_height, crop_width = sample_crop(height, width, self.scale, self.ratio, generator)
        flip = self.horizontal_flip and bool(torch.rand((), generator=generator) < 0.5)
        size = [self.spec.size, self.spec.size]
        cropped = resize(image[:, top : top + crop_height, left : left + crop_width], size, self._filter)
        turned = cropped.flip(-1) if flip else cropped
        return self.augment(turned, generator) if self.augment else turned


def resize(image: Tensor, size: list[int], mode: InterpolationMode) -> Tensor:
    """Resize uint8 (3, h, w) to (3, *size) with antialiasing, to the same values as torchvision's `resize`.

    The result's colours lie side by side in memory (as a decoder leaves them): the kernel for bytes takes two thirds of
    the time on that layout, and torchvision loses it when it crops.
    """
    if mode not in (InterpolationMode.BICUBIC, InterpolationMode.BILINEAR):
        other: Tensor = F.resize(image, size, interpolation=mode, antialias=True)
        return other
    rows = image[None].contiguous(memory_format=torch.channels_last)
    return interpolate(rows, size, mode=mode.value, align_corners=False, antialias=True)[0]


def sample_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) of a crop: area uniform in `scale`, aspect log-uniform in `ratio`.

    The rule of torchvision's RandomResizedCrop: ten attempts, then the largest central crop whose aspect fits `ratio`.
    A fixed number of draws is made, so whatever is drawn afterwards does not depend on the image's shape.
    """
    draws = torch.rand(_CROP_ATTEMPTS + 1, 2, generator=generator).tolist()
    (down, right), attempts = draws[0], draws[1:]
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, aspect_draw in attempts:
        area = height * width * (scale[0] + area_draw * (scale[1] - scale[0]))
        aspect = math.exp(log_low + aspect_draw * (log_high - log_low))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(down * (height - crop_height + 1))
            left = int(right * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = min(width, max(1, round(height * ratio[1])))
    crop_height = min(height, max(1, round(width / ratio[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _interpolation(spec: ImageSpec) -> InterpolationMode:
    if spec.interpolation not in _FILTERS:
        raise ConfigError(
            f"interpolation {spec.interpolation!r}",
            where="ImageSpec.interpolation",
            fix=f"choose one of {', '.join(sorted(_FILTERS))}",
        )
    return _FILTERS[spec.interpolation]
