"""A visual prompt (B, Q, L) and padded texts -> one sequence per row without holes.

The order of section 3.3 and Figure 3: visual prompt first. LAVIS tokenises prompt and target as one string and counts
the prompt's tokens; here they come apart, and closing the gap gives every architecture the positions it expects.
"""

from __future__ import annotations

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]
"""Embeddings (B, N, L) and the bool mask (B, N) of their real tokens."""


def visual_part(visual_prompt: Tensor, text: Part) -> Part:
    """A visual prompt (B, Q, L), all of it real, in the dtype of the text it stands beside."""
    embeddings, mask = text
    return visual_prompt.to(embeddings.dtype), mask.new_ones(visual_prompt.shape[:2])


def own_precision(embeddings: Tensor, *, overflows: bool = False) -> torch.autocast:
    """Context in which a frozen model runs: half-precision weights in their own format, float32 ones under autocast.

    Args:
        embeddings: what the model reads, in the format of its weights.
        overflows: the model overflows in float16 (T5): under float16 autocast its float32 weights compute in float32.
    """
    device = embeddings.device.type
    casts = torch.is_autocast_enabled(device) and embeddings.dtype == torch.float32
    return torch.autocast(
        device, enabled=casts and not (overflows and torch.get_autocast_dtype(device) == torch.float16)
    )


def pack(parts: list[Part], *, side: str) -> tuple[Tensor, Tensor]:
    """Concatenate padded embeddings so that the real tokens of each row are contiguous and in order.

    Args:
        parts: in sequence order.
        side: where the padding goes, "right" (training) or "left" (generation).

    Returns:
        (B, M, L) embeddings and the (B, M) bool mask, M the sum of the parts' lengths.
    """
    # all parts have one dtype; autocast would refuse to join float16 ones where it computes in bfloat16
    with torch.autocast(parts[0][0].device.type, enabled=False):
        embeddings_BML = torch.cat([embeddings for embeddings, _ in parts], dim=1)
    mask_BM = torch.cat([mask for _, mask in parts], dim=1)
    first = ~mask_BM if side == "right" else mask_BM
    order_BM = first.to(torch.uint8).argsort(dim=1, stable=True)
    index_BML = order_BM[:, :, None].expand(-1, -1, embeddings_BML.shape[2])
    return embeddings_BML.gather(1, index_BML), mask_BM.gather(1, order_BM)
