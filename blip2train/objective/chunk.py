"""A pass over many rows -> the same pass, chunk by chunk, that keeps one chunk's activations at a time.

Gradient caching (Gao et al. 2021, arXiv 2101.06983) written as activation checkpointing: autograd itself carries the
gradient of the whole batch's loss back into the chunks, and runs each chunk's pass once more when it comes by. LAVIS
accumulates losses of micro-batches instead, whose negatives stay inside the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint


def chunk_sizes(rows: int, most_rows: int, micro_batch_size: int | None) -> list[int]:
    """Share rows out into chunks of nearly equal size.

    Args:
        rows: of this rank.
        most_rows: of the rank that has most: every rank makes as many chunks as that one needs, since sharded weights
            are gathered by all ranks for every pass. A rank with very few rows has empty chunks.
        micro_batch_size: the most rows of a chunk; None: one chunk.

    Returns:
        Rows of each chunk.
    """
    number = 1 if micro_batch_size is None else -(-most_rows // micro_batch_size)
    return [rows // number + (index < rows % number) for index in range(number)]


def run_in_chunks(function: Callable[..., Any], sizes: Sequence[int], *rows: Any) -> Any:
    """Call `function` on consecutive rows and put its results one below the other.

    Args:
        function: of tensors (b, ...); may read others from its closure. It is run again in the backward pass, under the
            same dropout masks, and must not communicate.
        sizes: rows of each chunk. One chunk is a plain call that keeps its activations.
        rows: tensors, or lists and tuples of them, with rows along their first dimension; None stays None.

    Returns:
        What `function` returns, in the same nesting; every tensor concatenated along its first dimension.
    """
    if len(sizes) == 1:
        return function(*rows)
    leaves, nesting = tree_flatten(rows)
    # one split has one backward that joins the parts' gradients; slices would each make a gradient of full size
    parts = [torch.split(leaf, list(sizes)) if isinstance(leaf, Tensor) else [leaf] * len(sizes) for leaf in leaves]
    results = [
        _checkpointed(function, tree_unflatten([part[index] for part in parts], nesting)) for index in range(len(sizes))
    ]
    return tree_map(lambda *pieces: None if pieces[0] is None else torch.cat(pieces), *results)


def _checkpointed(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False)
