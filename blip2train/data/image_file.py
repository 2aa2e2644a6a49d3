"""Image bytes -> the size their header promises, and pixels where torchvision's decoders do not reach.

Implements two guards of the decode arrow: a decompression bomb is known by its header, before any pixel is allocated,
and rare formats (animations, TIFF, BMP, AVIF, JPEG 2000) go through PIL, of the first frame only. LAVIS opens
everything with PIL and has no limit but PIL's.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from blip2train.errors import DataError

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
"""All with a magic number; PIL knows others that run external programs (EPS) or accept any bytes (TGA)."""

MAX_PIXELS = 89_478_485
"""PIL's limit against decompression bombs: 256 MiB of RGB."""

_WEBP_EXIF, _WEBP_ANIMATION = 0x08, 0x02


class ImageTooLargeError(DataError):
    """More pixels than are decoded: a decompression bomb, or a scan nobody wants to train on."""


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raise ImageTooLargeError where width x height is above the limit."""
    if size[0] * size[1] > max_pixels:
        raise _too_large(f"an image of {size[0]} x {size[1]} pixels; at most {max_pixels:,} are decoded")


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG, PNG or still WebP by its header, in a few microseconds.

    None for everything else: for other formats, for headers that are not understood, and for WebP with an animation or
    with EXIF, whose orientation torchvision does not apply.
    """
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg_size(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        return _webp_size(data)
    return None


def decode_with_pil(data: bytes, max_pixels: int) -> Tensor:
    """Decode the first frame of any known format to RGB uint8 (3, h, w), EXIF orientation applied.

    Args:
        data: encoded image.
        max_pixels: width x height that is still decoded; PIL itself stops at twice `MAX_PIXELS`.

    Raises:
        ImageTooLargeError: more pixels than that, judged before anything is decoded.
        Exception: whatever PIL raises on broken bytes, which is nearly anything.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd metadata, and on sizes, which are checked here
        try:
            opened = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise _too_large(str(error)) from error
        with opened as image:
            check_size(image.size, max_pixels)
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                # PIL would clip at 255, which is nearly black, to white
                grey = torch.from_numpy((np.asarray(upright) >> 8).astype(np.uint8))
                return grey.repeat(3, 1, 1)
            pixels = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _too_large(found: str) -> ImageTooLargeError:
    fix = "make it smaller, remove it, or raise data.max_pixels"
    return ImageTooLargeError(found, where="decode_image", fix=fix)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        if marker == 0xDA:  # pixels before a frame header
            return None
        at += 2 if 0xD0 <= marker <= 0xD8 or marker == 0x01 else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8 ":
        return (int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF)
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X" and not data[20] & (_WEBP_EXIF | _WEBP_ANIMATION):
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None
