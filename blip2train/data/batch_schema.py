"""Samples -> the same samples, checked: every field of a batch is right before anything is stacked.

Implements the schema of the arrow between data and model. LAVIS collates whatever a data set returns: ids became a list
in one release, and `.view` failed far from the cause (LAVIS issues 629 and 658).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blip2train.batch import Sample
from blip2train.errors import DataError

_INT64 = range(-(1 << 63), 1 << 63)


def check_samples(samples: Sequence[Sample]) -> None:
    """Check what makes a batch.

    Args:
        samples: at least one; images are all uint8 (3, size, size), or all uint8 (P, C) from a feature cache, of one
            shape; captions and keys are texts, captions not empty; image ids fit int64.

    Raises:
        DataError: the first sample that does not fit, by dataset and key.
    """
    if not samples:
        raise DataError("a batch without samples", where="collate", fix="give at least one")
    first = samples[0]
    for sample in samples:
        # types are not believed here: a reader or transform of the user's may break them
        image: Any = sample.image
        caption: Any = sample.caption
        key: Any = sample.key
        if not isinstance(image, Tensor) or image.dtype != torch.uint8:
            _refuse(sample, f"an image of {_kind(image)}", "a transform returns a uint8 tensor")
        if not _is_image(image):
            _refuse(sample, f"an image of shape {tuple(image.shape)}", "a transform returns (3, size, size)")
        if image.shape != first.image.shape:
            _refuse(
                sample,
                f"shape {tuple(image.shape)}, in {first.dataset} key {first.key} of {tuple(first.image.shape)}",
                "give every dataset a transform of the same size; pixels and cached features do not mix",
            )
        if not isinstance(caption, str) or not caption:
            _refuse(sample, f"a caption {caption!r}", "a caption is a text with something in it")
        if not isinstance(key, str):
            _refuse(sample, f"a key of type {type(key).__name__}", "a key is a text")
        if type(sample.image_id) is not int or sample.image_id not in _INT64:
            _refuse(sample, f"an image id {sample.image_id!r}", "an id is an integer of 64 bits (`batch.to_image_id`)")


def _is_image(image: Tensor) -> bool:
    if image.ndim == 3:
        return image.shape[0] == 3 and image.shape[1] == image.shape[2] > 0
    return image.ndim == 2 and image.numel() > 0


def _kind(image: object) -> str:
    return f"type {image.dtype}" if isinstance(image, Tensor) else f"type {type(image).__name__}"


def _refuse(sample: Sample, found: str, fix: str) -> None:
    raise DataError(found, where=f"dataset {sample.dataset} key {sample.key}", fix=fix)
