"""Score matrix -> recall@k in both directions.

Protocol of the paper's section 4.4: an image counts if any of its captions is among the k best texts, a text if its
image is among the k best images. LAVIS breaks ties by the order of numpy's sort; here ties cost what chance would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from blip2train.errors import DataError

Ties = Literal["expected", "optimistic", "pessimistic"]


def recall_at_k(
    scores: ArrayLike,
    text_to_image: ArrayLike,
    ks: Sequence[int] = (1, 5, 10),
    *,
    scores_t2i: ArrayLike | None = None,
    ties: Ties = "expected",
) -> dict[str, float]:
    """Recall in percent: "text_recall@k" (image finds text) and "image_recall@k" (text finds image).

    The tie policy is the expectation over a random order of equal scores: a constant matrix scores exactly chance (and
    so is a way to compute it), and no result depends on the order of the data. NaN ranks last.

    Args:
        scores: (N, M) array, images by texts, higher is better; use -inf for pairs that were not scored.
        text_to_image: (M,) index of each text's image; an image may have any number of texts. An image without a text
            asks no question, but stays a candidate.
        ks: cut-offs; above the number of candidates everything is found.
        scores_t2i: (M, N), texts by images, where re-ranking scored the two directions apart; default `scores.T`.
        ties: "optimistic" and "pessimistic" give the bounds.

    Raises:
        DataError: shapes or indices do not fit.
    """
    image_by_text = _clean(scores)
    text_by_image = image_by_text.T if scores_t2i is None else _clean(scores_t2i)
    truth_M = np.asarray(text_to_image, dtype=np.int64)
    _check(image_by_text, text_by_image, truth_M)
    own_i2t_M = image_by_text[truth_M, np.arange(len(truth_M))]
    own_t2i_M = text_by_image[np.arange(len(truth_M)), truth_M]

    best_N = np.full(len(image_by_text), -np.inf, dtype=image_by_text.dtype)
    np.maximum.at(best_N, truth_M, own_i2t_M)
    positives_N = np.zeros(len(image_by_text), dtype=np.int64)
    np.add.at(positives_N, truth_M, own_i2t_M == best_N[truth_M])
    asked_N = positives_N > 0

    result: dict[str, float] = {}
    for k in ks:
        text_hits = _hits(image_by_text[asked_N], best_N[asked_N], positives_N[asked_N], k, ties)
        result[f"text_recall@{k}"] = 100.0 * float(text_hits.mean())
    for k in ks:
        image_hits = _hits(text_by_image, own_t2i_M, np.ones(len(truth_M), dtype=np.int64), k, ties)
        result[f"image_recall@{k}"] = 100.0 * float(image_hits.mean())
    return result


def _hits(
    scores_RC: NDArray[np.floating],
    best_R: NDArray[np.floating],
    positives_R: NDArray[np.int64],
    k: int,
    ties: Ties,
) -> NDArray[np.float64]:
    """Probability per query that one of the `positives_R` candidates with score `best_R` is among the first k."""
    above_R: NDArray[np.int64] = (scores_RC > best_R[:, None]).sum(axis=1)
    rivals_R: NDArray[np.int64] = (scores_RC == best_R[:, None]).sum(axis=1) - positives_R
    if ties == "optimistic":
        return np.where(above_R < k, 1.0, 0.0)
    if ties == "pessimistic":
        return np.where(above_R + rivals_R < k, 1.0, 0.0)
    # the k - above places left go to equal candidates in random order: all of them rivals, or a hit
    missed_R = np.ones(len(best_R))
    for place in range(k):
        taken_R = np.maximum(rivals_R - place, 0) / np.maximum(rivals_R + positives_R - place, 1)
        missed_R = np.where(above_R + place < k, missed_R * taken_R, missed_R)
    return 1.0 - missed_R


def _clean(scores: ArrayLike) -> NDArray[np.floating]:
    array = np.asarray(scores)
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float64)
    return np.where(np.isnan(array), -np.inf, array)


def _check(
    image_by_text: NDArray[np.floating], text_by_image: NDArray[np.floating], truth_M: NDArray[np.int64]
) -> None:
    shape = image_by_text.shape
    if len(shape) != 2 or truth_M.shape != shape[1:] or text_by_image.shape != shape[::-1]:
        raise DataError(
            f"scores {shape}, scores_t2i {text_by_image.shape}, text_to_image {truth_M.shape}",
            where="recall_at_k",
            fix="give (images, texts), (texts, images) and (texts,)",
        )
    if truth_M.size == 0 or truth_M.min() < 0 or truth_M.max() >= shape[0]:
        raise DataError(
            "text_to_image is empty or points outside the images",
            where="recall_at_k",
            fix=f"give every text an image index from 0 to {shape[0] - 1}",
        )
