"""The three self-attention masks of BLIP-2's Figure 2 as pure functions: the specification of how queries meet text.

Implements section 3.2 of the paper. LAVIS spreads the same three over call styles (separate passes, padding masks,
cached keys); here each is one function, and tests hold the Q-Former's verbs to it.

All return bool (B, S, S), S = Q + T, queries first: `mask[b, row, column]` is True where `row` may attend to `column`.
Padded text is never a visible column. Padded rows follow the rule of their side, so no row of a query is ever empty.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unimodal(num_queries: int, text_mask: Tensor) -> Tensor:
    """Mask of image-text contrastive learning: queries and text do not see each other.

                 Q   T
            Q  [ 1   0 ]
            T  [ 0   1 ]

    Args:
        num_queries: length of the query side, Q.
        text_mask: (B, T) bool, True on real tokens.

    Returns:
        (B, S, S) bool.
    """
    is_query_S = _is_query(num_queries, text_mask)
    same_side_SS = is_query_S[:, None] == is_query_S[None, :]
    return same_side_SS & _visible_columns(num_queries, text_mask)


def multimodal_causal(num_queries: int, text_mask: Tensor) -> Tensor:
    """Mask of image-grounded text generation: queries see queries; a token sees all queries and the text up to itself.

                 Q   T
            Q  [ 1   0 ]
            T  [ 1   ◣ ]

    Args:
        num_queries: length of the query side, Q.
        text_mask: (B, T) bool, True on real tokens.

    Returns:
        (B, S, S) bool.
    """
    is_query_S = _is_query(num_queries, text_mask)
    position_S = torch.arange(len(is_query_S), device=text_mask.device)
    allowed_SS = is_query_S[None, :] | (position_S[None, :] <= position_S[:, None])
    # a query row precedes all text, so `column <= row` opens no text to it
    return allowed_SS & _visible_columns(num_queries, text_mask)


def bidirectional(num_queries: int, text_mask: Tensor) -> Tensor:
    """Mask of image-text matching: everything sees everything.

                 Q   T
            Q  [ 1   1 ]
            T  [ 1   1 ]

    Args:
        num_queries: length of the query side, Q.
        text_mask: (B, T) bool, True on real tokens.

    Returns:
        (B, S, S) bool.
    """
    visible_B1S = _visible_columns(num_queries, text_mask)
    return visible_B1S.expand(-1, visible_B1S.shape[-1], -1)


def _is_query(num_queries: int, text_mask_BT: Tensor) -> Tensor:
    return torch.arange(num_queries + text_mask_BT.shape[1], device=text_mask_BT.device) < num_queries


def _visible_columns(num_queries: int, text_mask_BT: Tensor) -> Tensor:
    queries_BQ = text_mask_BT.new_ones(text_mask_BT.shape[0], num_queries)
    return torch.cat([queries_BQ, text_mask_BT], dim=1)[:, None, :]
