"""Image tokens (..., I) <-> the bytes (..., C) of a feature cache: plain formats, or 8 bits and a scale per token.

Concerns no equation of the paper; LAVIS computes its frozen tower's output anew in every step. A row of C bytes is one
token, little-endian: I values, and for the 8-bit codecs one float32 behind them, the token's own scale. A row is one
uint8 tensor from disk to device, so that what travels is as small as what is stored, and the device decodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2train.errors import ConfigError, DataError

_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class TokenCodec:
    """How one value is stored.

    Args:
        dtype: of the stored value.
        largest: stored value of a token's largest magnitude; None stores values as they are, without a scale.
        relative_error: of a decoded value, at most, as a share of its own magnitude.
        absolute_error: what may come on top, as a share of the token's largest magnitude.
    """

    dtype: torch.dtype
    largest: float | None
    relative_error: float
    absolute_error: float


CODECS: Mapping[str, TokenCodec] = {
    "float32": TokenCodec(torch.float32, None, 0.0, 0.0),
    # half a unit in the last place of 11 and 8 significant bits; below 2**-14, float16 has an absolute grid of 2**-24
    "float16": TokenCodec(torch.float16, None, 2.0**-11, 0.0),
    "bfloat16": TokenCodec(torch.bfloat16, None, 2.0**-8, 0.0),
    # e4m3: 4 significant bits down to 2**-6, then a grid of 2**-9
    "float8": TokenCodec(torch.float8_e4m3fn, 448.0, 2.0**-4, 2.0**-10 / 448.0),
    "int8": TokenCodec(torch.int8, 127.0, 0.0, 0.5 / 127.0),
}
"""By name. The widest that the encoder's own format needs loses nothing: float16 for a float16 encoder, and so on."""


def token_codec(name: str, *, where: str = "codec") -> TokenCodec:
    """The codec of this name; ConfigError, naming `where` it was asked for, if there is none."""
    if name not in CODECS:
        raise ConfigError(f"unknown codec {name!r}", where=where, fix=f"one of {', '.join(CODECS)}")
    return CODECS[name]


def bytes_per_token(codec: TokenCodec, width: int) -> int:
    """Bytes C of one stored token of `width` values."""
    return width * codec.dtype.itemsize + (0 if codec.largest is None else _SCALE_BYTES)


def encode_tokens(tokens: Tensor, codec: TokenCodec) -> Tensor:
    """Store image tokens.

    Args:
        tokens: (..., I) of any floating format.
        codec: how.

    Returns:
        (..., C) uint8 on the same device.

    Raises:
        DataError: a value that is not finite, or that the format is too narrow for.
    """
    if codec.largest is None:
        stored = tokens.to(codec.dtype).contiguous()
        _check_finite(stored, codec)
        return stored.view(torch.uint8)
    wide = tokens.to(torch.float32)
    magnitude = wide.abs().amax(dim=-1, keepdim=True)
    _check_finite(magnitude, codec)
    # the smallest normal number keeps the division finite where a whole token is zero, or close to it
    scale = (magnitude / codec.largest).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (wide / scale).clamp(-codec.largest, codec.largest)
    small = (scaled if codec.dtype.is_floating_point else scaled.round()).to(codec.dtype)
    return torch.cat([small.contiguous().view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def decode_tokens(stored: Tensor, codec: TokenCodec) -> Tensor:
    """Read (..., C) uint8 back as float32 (..., I), on the device it lies on."""
    if codec.largest is None:
        return stored.contiguous().view(codec.dtype).to(torch.float32)
    values, scale = stored[..., :-_SCALE_BYTES].contiguous(), stored[..., -_SCALE_BYTES:].contiguous()
    return values.view(codec.dtype).to(torch.float32) * scale.view(torch.float32)


def _check_finite(tensor: Tensor, codec: TokenCodec) -> None:
    if not bool(torch.isfinite(tensor).all()):
        dtype = str(codec.dtype).removeprefix("torch.")
        raise DataError(
            f"image tokens that are not finite, or too large for {dtype}",
            where="codec, model.vision_encoder.dtype",
            fix="store them as bfloat16, which has float32's range; if that fails, the encoder itself overflows: "
            "give it dtype=bfloat16 or float32",
        )
