"""Multi-head attention with BERT's post-norm residual: one class for the Q-Former's self- and cross-attention.

Keys and values are computed apart from the rows that read them, so that one image's, or one query pass's, can be used
again. Boolean masks over SDPA; LAVIS adds -10000 to the scores, which hides a token only by underflow.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]
"""Keys and values, each (B, H, C, K), of C tokens that can be attended to."""


class Attention(nn.Module):
    """Rows read a context; the result is added to the rows and normalised.

    Args:
        hidden_size: width D of the rows.
        num_heads: number of heads H; divides `hidden_size`.
        context_size: width of the context tokens: D for self-attention, I for cross-attention.
        dropout: probability, on the attention weights and on the output.
        layer_norm_eps: epsilon of the output's LayerNorm.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, context_size: int, dropout: float, layer_norm_eps: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(context_size, hidden_size)
        self.value = nn.Linear(context_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def keys_values(self, context: Tensor) -> KeysValues:
        """Project a context (B, C, context_size) to keys and values, each (B, H, C, K)."""
        return self._split_heads(self.key(context)), self._split_heads(self.value(context))

    def forward(self, rows: Tensor, keys_values: KeysValues, mask: Tensor | None = None) -> Tensor:
        """Let rows (B, R, D) read C tokens; returns (B, R, D).

        Args:
            rows: (B, R, D).
            keys_values: from `keys_values`, each (B, H, C, K).
            mask: bool, broadcastable to (B, H, R, C), True = may attend; None lets every row see everything. A row
                that may attend to nothing gets zeros from the attention and stays finite.
        """
        keys_BHCK, values_BHCK = keys_values
        attended_BHRK = F.scaled_dot_product_attention(
            self._split_heads(self.query(rows)),
            keys_BHCK,
            values_BHCK,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        attended_BRD = attended_BHRK.transpose(1, 2).flatten(2)
        update_BRD = F.dropout(self.output(attended_BRD), self.dropout, self.training)
        normalised_BRD: Tensor = self.norm(rows + update_BRD)
        return normalised_BRD

    def _split_heads(self, tokens_BCD: Tensor) -> Tensor:
        batch, length, width = tokens_BCD.shape
        return tokens_BCD.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)
