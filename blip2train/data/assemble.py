"""Parts of a batch, one per loader worker -> the batch, the same bytes as if one worker had collated it.

Implements the last step of the loader, in the training process: rows to their places, texts padded to the longest of
the batch. With a GPU they are written straight into pinned memory. LAVIS's loader lets each worker make whole batches,
so that which samples meet in a batch depends on the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from blip2train.data.stream import Part

BatchT = TypeVar("BatchT")


def assemble(parts: Sequence[Part[BatchT]], *, pad_id: int, pin: bool = False) -> BatchT:
    """Put the parts of one batch together.

    Args:
        parts: one per worker, in the order of the workers.
        pad_id: fills the end of shorter rows of token ids; masks are filled with False.
        pin: write tensors into pinned memory.

    Returns:
        A batch of the parts' type: tensors and lists in sample order; what is None in every part stays None.
    """
    filled = [(part, rows) for part in parts if (rows := part.rows) is not None]
    if len(filled) == 1:
        rows = filled[0][1]
        return rows.pin_memory() if pin else rows  # type: ignore[attr-defined]
    merged = {}
    for field in fields(filled[0][1]):  # type: ignore[arg-type]
        values = [getattr(rows, field.name) for _, rows in filled]
        places = [part.first for part, _ in filled]
        merged[field.name] = _merge(values, places, len(parts), pad_id, pin)
    return replace(filled[0][1], **merged)  # type: ignore[type-var]


def _merge(values: list[Any], places: list[int], step: int, pad_id: int, pin: bool) -> Any:
    """Values of one field: rows of value number i go to places[i], places[i] + step, ..."""
    if all(value is None for value in values):
        return None
    assert len({type(value) for value in values}) == 1, "parts of one batch have the same fields"
    if isinstance(values[0], Tensor):
        return _merge_tensors(values, places, step, pad_id, pin)
    merged = [None] * sum(len(value) for value in values)
    for value, place in zip(values, places, strict=True):
        merged[place::step] = value
    return merged


def _merge_tensors(values: list[Tensor], places: list[int], step: int, pad_id: int, pin: bool) -> Tensor:
    rest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    shape = (sum(len(value) for value in values), *rest)
    colours_last = values[0].ndim == 4 and values[0].is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if colours_last else torch.contiguous_format
    merged = torch.empty(shape, dtype=values[0].dtype, memory_format=layout, pin_memory=pin)
    for value, place in zip(values, places, strict=True):
        rows = merged[place::step]
        if value.shape[1:] != merged.shape[1:]:
            rows.fill_(False if value.dtype == torch.bool else pad_id)
        rows[tuple(slice(size) for size in value.shape)] = value
    return merged
