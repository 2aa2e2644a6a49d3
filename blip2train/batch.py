"""The values on the arrows between layers, and the one shape legend of the package.

    B  batch on this rank          G  batch gathered over ranks        Q  query tokens (32)
    T  text tokens                 S  Q + T, the joint sequence        P  image tokens incl. class token (257)
    I  vision width (1408)         D  Q-Former width (768)             E  contrastive space (256)
    L  language-model width        V  vocabulary                       H  heads        K  width per head

Batches are mutable dataclasses without a `.to()`: Lightning then moves each tensor itself (non-blocking), and a frozen
dataclass breaks under `precision="bf16-true"`. By convention nobody assigns to a field of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Target value that no loss counts; the only definition in the package."""


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """What a vision encoder wants to see; declared once, in the encoder's yaml.

    Args:
        size: side of the square input in pixels.
        mean: per-channel mean of the RGB image scaled to [0, 1].
        std: per-channel standard deviation on the same scale.
        interpolation: torchvision name of the resize filter ("bicubic", "bilinear", "nearest").
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        # yaml gives lists; equality and hashing want tuples
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))


@dataclass(slots=True)
class Sample:
    """One decoded training pair: `image` is uint8 (3, h, w), already transformed to the encoder's size.

    From a feature cache it is uint8 (P, C) instead: the image's tokens, C bytes each.
    `epoch` is the dataset's own: how often its records had been gone through before this draw.
    """

    key: str
    dataset: str
    image: Tensor
    caption: str
    image_id: int
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """One question about an image with its human answers (one answer where the truth is exact)."""

    question_id: str
    question: str
    answers: tuple[str, ...]
    kind: str = ""


@dataclass(slots=True)
class EvalItem:
    """One benchmark image with its truth: `image` is uint8 (3, h, w); `extra` is the record's remaining JSON."""

    key: str
    image_id: int
    image: Tensor
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


class _ImageBatch:
    """What the batches share: one kind of image input, and pinned-memory support for DataLoader."""

    __slots__ = ()
    pixel_values: Tensor | None
    stored_tokens: Tensor | None

    @property
    def images(self) -> Tensor:
        """What the vision encoder reads: pixels, or tokens that it has given before."""
        given = self.stored_tokens if self.pixel_values is None else self.pixel_values
        assert given is not None, "a batch has pixel_values or stored_tokens"
        return given

    def pin_memory(self) -> Self:
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                setattr(self, item.name, value.pin_memory())
        return self


@dataclass(slots=True)
class Stage1Batch(_ImageBatch):
    """Image-text pairs for the Q-Former.

    Args:
        pixel_values: (B, 3, h, w) uint8; the vision encoder normalises on its own device. None from a feature cache.
        input_ids: (B, T) Q-Former token ids, starting with [CLS]; the objective swaps in [DEC] where it generates.
        attention_mask: (B, T) bool, True on real tokens.
        image_ids: (B,) int64; equal ids are never each other's negatives.
        keys: B record keys.
        stored_tokens: (B, P, C) uint8, C bytes per image token, in the place of pixels (`CachedVisionEncoder`).
    """

    pixel_values: Tensor | None
    input_ids: Tensor
    attention_mask: Tensor
    image_ids: Tensor
    keys: list[str]
    stored_tokens: Tensor | None = None

    def __post_init__(self) -> None:
        _check_sizes(self, ("images", "input_ids", "attention_mask", "image_ids", "keys"))
        assert self.input_ids.shape == self.attention_mask.shape

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_tokens(self) -> Tensor:
        """Scalar: tokens of text, padding left out."""
        return self.attention_mask.sum()


@dataclass(slots=True)
class Stage2Batch(_ImageBatch):
    """Image, prompt and target for the language model: one type for both kinds of LLM.

    Args:
        pixel_values: (B, 3, h, w) uint8; None from a feature cache.
        prompt_ids: (B, Tp) LLM token ids before the target; Tp may be 0. For prefix language modelling, the prefix.
        prompt_mask: (B, Tp) bool.
        target_ids: (B, Tt) LLM token ids to predict, end token included.
        target_mask: (B, Tt) bool.
        keys: B record keys.
        stored_tokens: as in `Stage1Batch`.
    """

    pixel_values: Tensor | None
    prompt_ids: Tensor
    prompt_mask: Tensor
    target_ids: Tensor
    target_mask: Tensor
    keys: list[str]
    stored_tokens: Tensor | None = None

    def __post_init__(self) -> None:
        _check_sizes(self, ("images", "prompt_ids", "prompt_mask", "target_ids", "target_mask", "keys"))
        assert self.prompt_ids.shape == self.prompt_mask.shape
        assert self.target_ids.shape == self.target_mask.shape

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_tokens(self) -> Tensor:
        """Scalar: tokens of text, prompt and target, padding left out."""
        return self.prompt_mask.sum() + self.target_mask.sum()


def to_image_id(raw: str | int) -> int:
    """Map any record id to a stable non-negative int64; integers stay themselves."""
    if isinstance(raw, int):
        return raw
    if raw.isdecimal() and len(raw) <= 18:
        return int(raw)
    # surrogatepass: names in a tar need not be UTF-8
    return int.from_bytes(hashlib.sha256(raw.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def _check_sizes(batch: object, names: tuple[str, ...]) -> None:
    sizes = {name: len(getattr(batch, name)) for name in names}
    assert len(set(sizes.values())) == 1, f"batch fields disagree on the batch size: {sizes}"
    ids = [getattr(batch, name) for name in names if name.endswith("_ids")]
    assert all(tensor.dtype == torch.int64 for tensor in ids), "ids are int64"
