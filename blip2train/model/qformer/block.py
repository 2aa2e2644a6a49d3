"""One Q-Former block: shared self-attention, cross-attention for queries, a feed-forward network for each side.

Implements the block of Figure 2 (section 3.1): queries and text share self-attention only. As in LAVIS, which keeps the
block BERT-shaped (post-norm, exact GELU) so that BERT's weights fit both feed-forward networks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2train.model.qformer.attention import Attention, KeysValues


class FeedForward(nn.Module):
    """BERT's two-layer network with its residual and LayerNorm, over rows (B, R, D)."""

    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float, layer_norm_eps: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.expand = nn.Linear(hidden_size, intermediate_size)
        self.contract = nn.Linear(intermediate_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, rows: Tensor) -> Tensor:
        update_BRD = self.contract(F.gelu(self.expand(rows)))
        normalised_BRD: Tensor = self.norm(rows + F.dropout(update_BRD, self.dropout, self.training))
        return normalised_BRD


class QFormerBlock(nn.Module):
    """One layer over a joint sequence of queries, then text; either side may be empty.

    Args:
        hidden_size: width D.
        num_heads: heads of both attentions.
        intermediate_size: inner width of both feed-forward networks.
        image_dim: width I of the image tokens; None makes a block without cross-attention.
        dropout: probability, everywhere in the block.
        layer_norm_eps: epsilon of every LayerNorm.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        image_dim: int | None,
        dropout: float,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        self.self_attention = Attention(hidden_size, num_heads, hidden_size, dropout, layer_norm_eps)
        self.cross_attention = (
            None if image_dim is None else Attention(hidden_size, num_heads, image_dim, dropout, layer_norm_eps)
        )
        self.query_ffn = FeedForward(hidden_size, intermediate_size, dropout, layer_norm_eps)
        self.text_ffn: FeedForward | None = FeedForward(hidden_size, intermediate_size, dropout, layer_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        num_queries: int,
        mask: Tensor | None = None,
        image: KeysValues | None = None,
        past: KeysValues | None = None,
        rows: int | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Run the block on (B, S, D).

        Args:
            hidden: (B, S, D), the first `num_queries` rows are queries, the others text.
            num_queries: 0 for text alone.
            mask: bool, broadcastable to (B, H, S, past + S), True = may attend.
            image: this block's image keys and values, (B, H, P, K); needed where queries cross-attend.
            past: keys and values of earlier tokens, put before this sequence's own.
            rows: compute only the first `rows` output rows; all tokens still serve as context. For the last layer,
                when its other rows are read by nobody. A mask must then broadcast over rows.

        Returns:
            (B, rows or S, D), and this sequence's own keys and values (B, H, S, K).
        """
        own = self.self_attention.keys_values(hidden)
        context = own if past is None else (torch.cat([past[0], own[0]], dim=2), torch.cat([past[1], own[1]], dim=2))
        attended_BRD = self.self_attention(hidden if rows is None else hidden[:, :rows], context, mask)
        sides = []
        if num_queries > 0:
            queries_BQD = attended_BRD[:, :num_queries]
            if self.cross_attention is not None:
                assert image is not None, "queries cross-attend to an image in this block"
                queries_BQD = self.cross_attention(queries_BQD, image)
            sides.append(self.query_ffn(queries_BQD))
        if attended_BRD.shape[1] > num_queries:
            assert self.text_ffn is not None, "the text branch was dropped"
            sides.append(self.text_ffn(attended_BRD[:, num_queries:]))
        return (sides[0] if len(sides) == 1 else torch.cat(sides, dim=1)), own
