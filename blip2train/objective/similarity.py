"""Image-text similarity: (B, Q, E) image features and (B, E) text features -> one number per pair.

Implements section 3.2 of the paper: the largest cosine over the queries. One matrix product instead of LAVIS's
broadcast one, which expands both sides to (B, G, Q, E) first.
"""

from __future__ import annotations

from torch import Tensor

from blip2train.model.autocast import full_precision, without_autocast


def query_text_similarity(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Similarity of every image with every text, in float32 or better also under autocast.

    Args:
        image_features: (M, Q, E), normalised.
        text_features: (N, E), normalised.

    Returns:
        (M, N): the largest dot product over the Q queries, not divided by the temperature. The gradient goes to the
        winning query alone.
    """
    num_images, num_queries, width = image_features.shape
    with without_autocast(image_features):
        queries_RE = full_precision(image_features).reshape(num_images * num_queries, width)
        products_RN = queries_RE @ full_precision(text_features).T
        return products_RN.reshape(num_images, num_queries, -1).max(dim=1).values


def query_likeness(image_features: Tensor) -> Tensor:
    """How much the queries of an image say the same: their mean pairwise cosine, averaged over images; no gradient.

    Args:
        image_features: (M, Q, E), normalised.

    Returns:
        Scalar, float32 or better: 1 where all queries of every image agree, also with a single query.
    """
    features = full_precision(image_features.detach())
    num_queries = features.shape[1]
    # the squared length of the sum counts every ordered pair once, and each query with itself
    pairs_M = features.sum(dim=1).square().sum(dim=1) - features.square().sum(dim=(1, 2))
    return pairs_M.mean() / (num_queries * (num_queries - 1)) if num_queries > 1 else features.new_ones(())
