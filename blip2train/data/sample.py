"""RawRecord -> Sample (training) or EvalItem (benchmarks); what cannot be used is counted, by cause.

Implements the reading side of the record format (`record_field.py`). LAVIS swallows broken records
(`warn_and_continue`, or it draws another index at random), so nobody knows what a run has seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip2train.batch import EvalItem, Question, Sample
from blip2train.data.drop import Drop, DropLedger
from blip2train.data.image_file import MAX_PIXELS, ImageTooLargeError
from blip2train.data.image_transform import Transform, decode_image
from blip2train.data.record_field import (
    UnusableError,
    all_captions,
    check_text,
    image_id_of,
    judge_captions,
    read_fields,
    read_questions,
    usable_captions,
)
from blip2train.data.shards import IMAGE_EXTENSIONS, RawRecord, open_shards, read_shard
from blip2train.data.stored_tokens import TOKENS, StoredTokens
from blip2train.errors import DataError

_KNOWN_FIELDS = ("captions", "caption", "image_id", "questions")


def to_sample(
    record: RawRecord,
    dataset: str,
    transform: Transform | StoredTokens,
    generator: torch.Generator,
    epoch: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Sample | Drop:
    """Decode one record for training.

    Args:
        record: as `shards` reads it; one that could not be read carries its cause under `__broken__`.
        dataset: the source's name.
        transform: training augmentation; `StoredTokens` where the record comes from a feature cache.
        generator: draws the caption, uniformly over the usable ones, and the augmentation.
        epoch: of the dataset, for `Sample.epoch`.
        max_pixels: larger images are dropped undecoded.
    """
    try:
        fields = read_fields(record)
        usable = usable_captions(fields)
        # always drawn, so that the augmentation does not depend on the number of captions
        choice = int(torch.randint(1 << 31, (), generator=generator)) % len(usable)
        if isinstance(transform, StoredTokens):
            image = _read_tokens(record, transform)
        else:
            image = transform(_read_image(record, max_pixels), generator)
    except UnusableError as error:
        return _drop(record, dataset, error)
    key = record["__key__"]
    return Sample(key, dataset, image, usable[choice], image_id_of(fields, key), epoch)


def to_eval_item(record: RawRecord, dataset: str, transform: Transform) -> EvalItem | Drop:
    """Decode one record with all its captions and questions, as written; neither is required."""
    key = record["__key__"]
    try:
        fields = read_fields(record)
        captions = all_captions(fields)
        for caption in captions:
            check_text(caption)
        image = _read_image(record)
        questions = read_questions(fields, key)
    except UnusableError as error:
        return _drop(record, dataset, error)
    return EvalItem(
        key=key,
        image_id=image_id_of(fields, key),
        image=transform(image, None),
        captions=tuple(caption for caption in captions if caption.strip()),
        questions=questions,
        extra={name: value for name, value in fields.items() if name not in _KNOWN_FIELDS},
    )


@dataclass(frozen=True, slots=True)
class RecordText:
    """What a record says, its image left encoded.

    Args:
        captions: those that training draws from.
        refused: what is wrong with the others.
        questions: as benchmarks see them.
        bad_questions: what is wrong with them, for which a benchmark drops the record and training does not.
        image_id: see `batch.to_image_id`.
        extra: the remaining JSON.
    """

    captions: tuple[str, ...]
    refused: tuple[str, ...]
    questions: tuple[Question, ...]
    bad_questions: str
    image_id: int
    extra: Mapping[str, Any]


def read_text(record: RawRecord, dataset: str) -> RecordText | Drop:
    """Read a record without decoding its image; neither captions nor questions are required."""
    key = record["__key__"]
    try:
        fields = read_fields(record)
        usable, refused = judge_captions(fields)
        if refused and not usable:
            raise refused[0]
    except UnusableError as error:
        return _drop(record, dataset, error)
    questions: tuple[Question, ...] = ()
    bad_questions = ""
    try:
        questions = read_questions(fields, key)
    except UnusableError as error:
        bad_questions = error.detail
    return RecordText(
        captions=tuple(usable),
        refused=tuple(error.detail for error in refused),
        questions=questions,
        bad_questions=bad_questions,
        image_id=image_id_of(fields, key),
        extra={name: value for name, value in fields.items() if name not in _KNOWN_FIELDS},
    )


def read_eval_items(
    urls: str | Sequence[str],
    transform: Transform,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    ledger: DropLedger | None = None,
    dataset: str = "evaluation data",
) -> Iterator[EvalItem]:
    """Read every record exactly once, in shard order: the finite stream that benchmarks use.

    Args:
        urls: shards.
        transform: normally an `EvalTransform`.
        limit: stop after this many records over all ranks.
        rank: takes records whose index is `rank` modulo `world_size`.
        world_size: number of readers that share the records.
        ledger: counts what is used and dropped. By default the first record that cannot be used is an error: a
            benchmark that silently lacks an image is another benchmark.
        dataset: name under which the ledger counts.

    Raises:
        DataError: shards missing, a record that cannot be used (above the allowed share), or nothing left.
    """
    ledger = ledger or DropLedger([dataset], max_dropped_share=0.0, minimum_records=1, setting=None)
    num_read = 0
    for index, record in enumerate(record for shard in open_shards(urls) for record in read_shard(shard)):
        if index == limit:
            break
        num_read += 1
        if index % world_size != rank:
            continue
        item = to_eval_item(record, dataset, transform)
        if isinstance(item, Drop):
            ledger.add({dataset: 1}, [item])
            continue
        ledger.add({dataset: 1}, [])
        yield item
    if num_read == 0:
        raise DataError("no records to evaluate on", where=f"urls={urls}", fix="check the shards and the limit")


def _drop(record: RawRecord, dataset: str, error: UnusableError) -> Drop:
    return Drop(dataset, error.cause, error.detail, str(record["__url__"]), record["__key__"])


def _read_image(record: RawRecord, max_pixels: int = MAX_PIXELS) -> Tensor:
    data = next((record[extension] for extension in IMAGE_EXTENSIONS if extension in record), None)
    if data is None:
        names = ", ".join(name for name in record if name[0] != "_")
        raise UnusableError("no_image", f"files of the record: {names or 'none'}")
    try:
        return decode_image(data, max_pixels)
    except ImageTooLargeError as error:
        raise UnusableError("image_too_large", error.found) from error
    except DataError as error:
        raise UnusableError("corrupt_image", error.found) from error


def _read_tokens(record: RawRecord, stored: StoredTokens) -> Tensor:
    if TOKENS not in record:
        raise UnusableError("no_image", "a record of a feature cache without its tokens")
    try:
        return stored.read(record[TOKENS])
    except DataError as error:
        raise UnusableError("corrupt_image", error.found) from error
