"""What scores captions in CapFilt: an image-text model behind one call; the score is the cosine of the two.

Implements the filter of CapFilt as the paper has it: similarity by CLIP ViT-L/14 (BLIP itself used its matching head).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from blip2train.errors import DataError


@dataclass(frozen=True, slots=True)
class Ranking:
    """Scores of the texts of some images.

    Args:
        scores: cosines in float32, as the texts were given.
        num_truncated: texts that were longer than the model reads.
    """

    scores: list[list[float]]
    num_truncated: int


class Ranker(Protocol):
    """Scores texts against images."""

    def __call__(self, images: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> Ranking:
        """Score every text of `texts[i]` against image i (3, h, w) uint8."""
        ...


def cosine_scores(images_BE: Tensor, texts_NE: Tensor, counts: Sequence[int], where: str) -> list[list[float]]:
    """Cosines of features, in float32.

    Args:
        images_BE: one row per image.
        texts_NE: the texts of all images, one image after the other.
        counts: texts of each image; they sum to N.
        where: the model, for messages.

    Raises:
        DataError: a score is not finite.
    """
    images_BE = F.normalize(images_BE.float(), dim=1)
    texts_NE = F.normalize(texts_NE.float(), dim=1)
    owners = [row for row, count in enumerate(counts) for _ in range(count)]
    scores_N = (images_BE[owners] * texts_NE).sum(dim=1).cpu()
    if not bool(scores_N.isfinite().all()):
        raise DataError(
            "a similarity that is not finite", where=where, fix="set ranker.dtype=float32; check the weights"
        )
    flat = iter(scores_N.tolist())
    return [list(islice(flat, count)) for count in counts]
