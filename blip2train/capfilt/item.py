"""RawRecord -> what CapFilt works on: a decoded image and the captions that training would draw from.

Implements the reading side of CapFilt. A record that training drops for its captions alone is not lost here: its image
gets new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blip2train.data.drop import Drop
from blip2train.data.sample import read_text, to_eval_item
from blip2train.data.shards import RawRecord

DATASET = "capfilt"
_TEXTS = ("json", "txt")


@dataclass(frozen=True, slots=True)
class Item:
    """One image with its web captions.

    Args:
        key: of the record.
        image: uint8 (3, h, w), upright, of its own size.
        captions: usable ones, as written; may be empty.
        num_refused: captions that cannot be used.
        is_output: whether CapFilt wrote this record.
    """

    key: str
    image: Tensor
    captions: tuple[str, ...]
    num_refused: int
    is_output: bool


def read_item(record: RawRecord) -> Item | Drop:
    """Decode one record; captions that say nothing count as none."""
    text = read_text(record, DATASET)
    if isinstance(text, Drop) and text.cause != "empty_caption":
        return text
    # the image alone: its text has been judged
    files = {name: data for name, data in record.items() if name not in _TEXTS}
    picture = to_eval_item(files, DATASET, _as_it_is)
    if isinstance(picture, Drop):
        return picture
    if isinstance(text, Drop):
        return Item(record["__key__"], picture.image, (), 1, False)
    return Item(record["__key__"], picture.image, text.captions, len(text.refused), "caption_origins" in text.extra)


def _as_it_is(image: Tensor, generator: torch.Generator | None) -> Tensor:
    return image
