"""Stored image tokens: what each codec loses, against float64, and which bytes it writes, against numpy."""

import numpy as np
import pytest
import torch
from tiny_model import IMAGE
from torch import Tensor

from blip2train.errors import ConfigError, DataError
from blip2train.model.vision_encoder.cached import CachedVisionEncoder
from blip2train.model.vision_encoder.token_codec import (
    CODECS,
    bytes_per_token,
    decode_tokens,
    encode_tokens,
    token_codec,
)

WIDTH = 24


def tokens_with_outliers(count: int = 500) -> Tensor:
    """(count, P, I) float32 as ViTs make them: most values near one, single channels a hundred times as large."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(count, 3, WIDTH, generator=generator) * torch.rand(count, 3, 1, generator=generator).exp2()
    tokens[..., 5] *= 100
    tokens[..., 6] *= 1e-3
    return tokens


@pytest.mark.parametrize("name", CODECS)
def test_every_value_comes_back_within_the_stated_error(name: str) -> None:
    codec, tokens = CODECS[name], tokens_with_outliers()
    exact = tokens.double()
    error = (decode_tokens(encode_tokens(tokens, codec), codec).double() - exact).abs()
    largest = exact.abs().amax(dim=-1, keepdim=True)
    rounding = 2.0**-22 * largest  # of the float32 division and multiplication by the scale
    allowed = (
        codec.relative_error * exact.abs() + codec.absolute_error * largest + (codec.largest is not None) * rounding
    )
    if name == "float16":
        allowed = allowed.clamp_min(2.0**-25)
    assert (error <= allowed).all()
    # and the bounds say something: the worst value comes close to them
    assert name == "float32" or (error / allowed).max() > 0.8


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_a_format_as_wide_as_the_tokens_gives_back_every_bit(name: str) -> None:
    codec = CODECS[name]
    tokens = tokens_with_outliers().to(codec.dtype).float()
    assert torch.equal(decode_tokens(encode_tokens(tokens, codec), codec), tokens)


def test_the_bytes_are_little_endian_values_with_one_scale_behind_each_token() -> None:
    tokens = torch.tensor([[[1.0, -2.0, 4.0, 0.5]]])
    assert encode_tokens(tokens, CODECS["float16"]).numpy().tobytes() == np.array([1, -2, 4, 0.5], "<f2").tobytes()
    stored = encode_tokens(tokens, CODECS["int8"])
    assert stored.shape == (1, 1, bytes_per_token(CODECS["int8"], 4)) == (1, 1, 8)
    raw = stored.numpy().tobytes()
    assert np.frombuffer(raw[:4], "i1").tolist() == [32, -64, 127, 16]  # 127 / 4 = 31.75 per unit
    assert np.frombuffer(raw[4:], "<f4")[0] == np.float32(4 / 127)
    raw = encode_tokens(tokens, CODECS["float8"]).numpy().tobytes()
    assert list(raw[:4]) == [0x6E, 0xF6, 0x7E, 0x66]  # 112, -224, 448, 56 in e4m3
    assert np.frombuffer(raw[4:], "<f4")[0] == np.float32(4 / 448)


@pytest.mark.parametrize("name", CODECS)
def test_tokens_of_zeros_and_of_the_smallest_numbers_stay_finite(name: str) -> None:
    tokens = torch.zeros(2, WIDTH)
    tokens[1] = 1e-44
    decoded = decode_tokens(encode_tokens(tokens, CODECS[name]), CODECS[name])
    assert torch.equal(decoded[0], torch.zeros(WIDTH))
    assert decoded.isfinite().all() and decoded.abs().max() < 1e-37


@pytest.mark.parametrize(("name", "value"), [("float16", 7e4), ("bfloat16", float("nan")), ("int8", float("inf"))])
def test_what_a_format_cannot_hold_is_refused(name: str, value: float) -> None:
    tokens = torch.ones(2, 3, WIDTH)
    tokens[1, 2, 3] = value
    with pytest.raises(DataError, match=r"not finite, or too large for"):
        encode_tokens(tokens, CODECS[name])


def test_an_unknown_codec_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"unknown codec 'fp8'[\s\S]*float32, float16, bfloat16, float8, int8"):
        token_codec("fp8")


@pytest.mark.parametrize("name", CODECS)
def test_the_cached_encoder_decodes_and_has_nothing_to_train_or_to_hold(name: str) -> None:
    tokens = tokens_with_outliers(4)
    encoder = CachedVisionEncoder(IMAGE, num_tokens=3, embed_dim=WIDTH, codec=name)
    decoded = encoder(encode_tokens(tokens, CODECS[name]))
    assert decoded.shape == tokens.shape and decoded.dtype == torch.float32
    assert not encoder.trainable and not list(encoder.parameters()) and not encoder.state_dict()


def test_the_cached_encoder_refuses_images() -> None:
    encoder = CachedVisionEncoder(IMAGE, num_tokens=3, embed_dim=WIDTH, codec="int8")
    with pytest.raises(ConfigError, match=r"stored tokens \(B, 3, 28\)"):
        encoder(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
