"""Nucleus sampling whose draws belong to the image: one uniform number per (seed, key, caption, token).

Implements the caption generation of CapFilt (BLIP, section 4.2: nucleus sampling). Libraries draw all rows of a batch
from one generator, so that a caption depends on its neighbours in the batch; here batch size, order, resuming and the
number of processes change no draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def draw_uniforms(seed: int, keys: Sequence[str], num_captions: int, num_tokens: int) -> Tensor:
    """Uniform numbers in [0, 1) for every token of every caption: (len(keys) * num_captions, num_tokens), float32.

    Rows are grouped by image, as `num_return_sequences` orders them. A row depends on the seed, its key and its place
    among the captions of the image; asking for more captions or tokens changes none of the others.
    """
    rows = []
    for key in keys:
        for number in range(num_captions):
            digest = hashlib.sha256(f"{seed}\0{number}\0{key}".encode("utf-8", "surrogatepass")).digest()
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
            rows.append(generator.random(num_tokens, dtype=np.float32))
    return torch.from_numpy(np.stack(rows))


class SeededNucleus:
    """A logits processor of transformers that leaves one token per row: the one that the row's uniform number draws.

    What follows it, the greedy choice or `multinomial`, can then only take this token. The nucleus is the smallest set
    of tokens with a probability of at least `top_p`, as in transformers' `TopPLogitsWarper`.

    Args:
        uniforms: (rows, tokens), from `draw_uniforms`.
        top_p: nucleus; 1 is all tokens.
        temperature: divides the logits.
    """

    def __init__(self, uniforms: Tensor, top_p: float = 1.0, temperature: float = 1.0) -> None:
        self._uniforms, self._top_p, self._temperature = uniforms, top_p, temperature
        self._start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose the next token of every row: `scores` (rows, V) -> the same shape, minus infinity but for one."""
        if self._start is None:
            self._start = input_ids.shape[1]
        step = input_ids.shape[1] - self._start
        assert scores.shape[0] == self._uniforms.shape[0], "one row of uniform numbers per caption"
        sorted_RV, order_RV = (scores.float() / self._temperature).sort(dim=1, descending=True, stable=True)
        probability_RV = sorted_RV.softmax(dim=1)
        before_RV = probability_RV.cumsum(dim=1) - probability_RV
        # the first is in the nucleus also where rounding says it is not
        inside_RV = (before_RV < self._top_p).index_fill(
            1, torch.zeros(1, dtype=torch.int64, device=scores.device), True
        )
        inside_RV &= probability_RV > 0
        mass_RV = (probability_RV * inside_RV).cumsum(dim=1)
        threshold_R1 = self._uniforms[:, step, None].to(scores.device) * mass_RV[:, -1:]
        place_R = (mass_RV <= threshold_R1).sum(dim=1)
        place_R = torch.minimum(place_R, inside_RV.sum(dim=1) - 1)  # rounding must not step out of the nucleus
        token_R1 = order_RV.gather(1, place_R[:, None])
        return torch.full_like(scores, -torch.inf).scatter_(1, token_R1, 0.0)
