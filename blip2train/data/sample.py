"""RawRecord -> Sample (training) or EvalItem (benchmarks); what cannot be used is counted, by cause.

Implements the reading side of the record format below. LAVIS swallows broken records (`warn_and_continue`, or it draws
another index at random), so nobody knows what a run has seen.

A record is an image beside a JSON object: `{"captions": [...], "image_id": 285, "questions": [{"question_id",
"question", "answers": [...], "kind"}], ...}`. Only `captions` is needed for training; `image_id` defaults to the key;
unknown fields go to `EvalItem.extra`. A lone `caption` string, or a plain `.txt` beside the image (img2dataset,
LAION), is one caption.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip2train.batch import EvalItem, Question, Sample, to_image_id
from blip2train.data.caption import clean_caption
from blip2train.data.drop import Drop, DropCause, DropLedger
from blip2train.data.image_file import MAX_PIXELS, ImageTooLargeError
from blip2train.data.image_transform import Transform, decode_image
from blip2train.data.shards import IMAGE_EXTENSIONS, RawRecord, open_shards, read_shard
from blip2train.data.stored_tokens import DROPPED, TOKENS, StoredTokens
from blip2train.errors import DataError

_KNOWN_FIELDS = ("captions", "caption", "image_id", "questions")
_MAX_CHARACTERS = 10_000
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")


class _UnusableError(Exception):
    """Why a record cannot be used; becomes its `Drop`."""

    def __init__(self, cause: DropCause, detail: str) -> None:
        self.cause, self.detail = cause, detail


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
        fields = _read_fields(record)
        usable = _usable_captions(fields)
        # always drawn, so that the augmentation does not depend on the number of captions
        choice = int(torch.randint(1 << 31, (), generator=generator)) % len(usable)
        if isinstance(transform, StoredTokens):
            image = _read_tokens(record, transform)
        else:
            image = transform(_read_image(record, max_pixels), generator)
    except _UnusableError as error:
        return _drop(record, dataset, error)
    key = record["__key__"]
    return Sample(key, dataset, image, usable[choice], _image_id(fields, key), epoch)


def to_eval_item(record: RawRecord, dataset: str, transform: Transform) -> EvalItem | Drop:
    """Decode one record with all its captions and questions, as written; neither is required."""
    key = record["__key__"]
    try:
        fields = _read_fields(record)
        captions = _captions(fields)
        for caption in captions:
            _check_text(caption)
        image = _read_image(record)
        questions = _questions(fields, key)
    except _UnusableError as error:
        return _drop(record, dataset, error)
    return EvalItem(
        key=key,
        image_id=_image_id(fields, key),
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
        fields = _read_fields(record)
        usable, refused = _judge_captions(fields)
        if refused and not usable:
            raise refused[0]
    except _UnusableError as error:
        return _drop(record, dataset, error)
    questions: tuple[Question, ...] = ()
    bad_questions = ""
    try:
        questions = _questions(fields, key)
    except _UnusableError as error:
        bad_questions = error.detail
    return RecordText(
        captions=tuple(usable),
        refused=tuple(error.detail for error in refused),
        questions=questions,
        bad_questions=bad_questions,
        image_id=_image_id(fields, key),
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


def _drop(record: RawRecord, dataset: str, error: _UnusableError) -> Drop:
    return Drop(dataset, error.cause, error.detail, str(record["__url__"]), record["__key__"])


def _read_fields(record: RawRecord) -> dict[str, Any]:
    """The record's JSON, with a plain txt beside the image taken as its caption."""
    if "__broken__" in record:
        raise _UnusableError(*record["__broken__"])
    if DROPPED in record:
        raise _UnusableError(*json.loads(record[DROPPED]))
    fields: dict[str, Any] = {}
    if "json" in record:
        try:
            loaded = json.loads(record["json"])
        except UnicodeDecodeError as error:
            raise _UnusableError("bad_text", f"JSON that is not UTF-8: {error.reason} at {error.start}") from error
        except (ValueError, RecursionError) as error:
            raise _UnusableError("bad_json", str(error)) from error
        if not isinstance(loaded, dict):
            raise _UnusableError("bad_json", f"a JSON {type(loaded).__name__} where an object is expected")
        fields = loaded
    if "txt" in record and not _given(fields):
        try:
            fields["captions"] = [record["txt"].decode("utf-8-sig")]
        except UnicodeDecodeError as error:
            raise _UnusableError("bad_text", f"txt that is not UTF-8: {error.reason} at {error.start}") from error
    return fields


def _given(fields: Mapping[str, Any]) -> Any:
    """What stands for captions; None where nothing does, which pandas writes as null or NaN."""
    found = fields.get("captions", fields.get("caption"))
    return None if found == [] or (isinstance(found, float) and math.isnan(found)) else found


def _captions(fields: Mapping[str, Any]) -> list[str]:
    """All captions as written; none where the record has none.

    Raises:
        _UnusableError: something else than a text, or a list of texts.
    """
    found = _given(fields)
    if found is None:
        return []
    rows = found if isinstance(found, list) else [found]
    for row in rows:
        if not isinstance(row, str):
            raise _UnusableError("bad_json", f"captions of type {type(found).__name__} with a {type(row).__name__}")
    return rows


def _usable_captions(fields: Mapping[str, Any]) -> list[str]:
    """The captions that say something; one bad caption does not cost a record that has good ones.

    Raises:
        _UnusableError: none is left.
    """
    usable, refused = _judge_captions(fields)
    if not usable:
        raise refused[0] if refused else _UnusableError("no_caption", "neither captions in the JSON nor a txt file")
    return usable


def _judge_captions(fields: Mapping[str, Any]) -> tuple[list[str], list[_UnusableError]]:
    """The captions that say something, and what is wrong with the others."""
    found = _given(fields)
    rows = found if isinstance(found, list) else [] if found is None else [found]
    usable, refused = [], []
    for row in rows:
        try:
            if not isinstance(row, str):
                raise _UnusableError("bad_json", f"a caption of type {type(row).__name__}")
            _check_text(row)
            text = row[:_MAX_CHARACTERS]
            if not _says_something(clean_caption(text)):
                raise _UnusableError("empty_caption", f"nothing left of {text!r} after cleaning")
            usable.append(text)
        except _UnusableError as error:
            refused.append(error)
    return usable, refused


def _check_text(text: str) -> None:
    """Refuse what no tokenizer takes: half surrogate pairs (JSON can spell them), and NUL, which is binary data."""
    if "\0" in text:
        raise _UnusableError("bad_text", f"a NUL character in {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _UnusableError("bad_text", f"half a surrogate pair in {text!r}") from error


def _says_something(text: str) -> bool:
    return (text.isascii() and bool(text.strip())) or any(unicodedata.category(c) not in _INVISIBLE for c in text)


def _image_id(fields: Mapping[str, Any], key: str) -> int:
    found = fields.get("image_id", key)
    fits = isinstance(found, str) or (isinstance(found, int) and abs(found) < 1 << 63)
    return to_image_id(found if fits else str(found))


def _read_image(record: RawRecord, max_pixels: int = MAX_PIXELS) -> Tensor:
    data = next((record[extension] for extension in IMAGE_EXTENSIONS if extension in record), None)
    if data is None:
        names = ", ".join(name for name in record if name[0] != "_")
        raise _UnusableError("no_image", f"files of the record: {names or 'none'}")
    try:
        return decode_image(data, max_pixels)
    except ImageTooLargeError as error:
        raise _UnusableError("image_too_large", error.found) from error
    except DataError as error:
        raise _UnusableError("corrupt_image", error.found) from error


def _read_tokens(record: RawRecord, stored: StoredTokens) -> Tensor:
    if TOKENS not in record:
        raise _UnusableError("no_image", "a record of a feature cache without its tokens")
    try:
        return stored.read(record[TOKENS])
    except DataError as error:
        raise _UnusableError("corrupt_image", error.found) from error


def _questions(fields: Mapping[str, Any], key: str) -> tuple[Question, ...]:
    try:
        questions = tuple(_question(row, f"{key}/{index}") for index, row in enumerate(fields.get("questions") or ()))
    except (KeyError, TypeError, AttributeError) as error:
        raise _UnusableError("bad_json", f"a question without {error}") from error
    for question in questions:
        _check_text(question.question)
    return questions


def _question(row: Mapping[str, Any], default_id: str) -> Question:
    if not isinstance(row["question"], str):
        raise TypeError(f"text, but a {type(row['question']).__name__}")
    return Question(
        question_id=str(row.get("question_id", default_id)),
        question=row["question"],
        answers=tuple(str(answer) for answer in row["answers"]),
        kind=str(row.get("kind", "")),
    )
