"""Packing joins embeddings in the language model's own format, whatever autocast computes in."""

import pytest
import torch

from blip2train.model.language_model.packing import pack


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_parts_keep_their_dtype_under_bfloat16_autocast(dtype: torch.dtype) -> None:
    parts = [(torch.ones(2, length, 4, dtype=dtype), torch.ones(2, length, dtype=torch.bool)) for length in (3, 5)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, _ = pack(parts, side="right")
    assert embeddings.dtype == dtype and embeddings.shape == (2, 8, 4)
