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
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from blip2train.batch import EvalItem, Question, Sample, to_image_id
from blip2train.data.caption import clean_caption
from blip2train.data.image_transform import Transform, decode_image
from blip2train.data.shards import IMAGE_EXTENSIONS, RawRecord, expand_urls, read_shard
from blip2train.errors import DataError

logger = logging.getLogger(__name__)

DropCause = Literal["no_image", "corrupt_image", "bad_json", "no_caption", "empty_caption"]
DROP_CAUSES: tuple[DropCause, ...] = get_args(DropCause)

_LOGGED_DROPS = 10


@dataclass(frozen=True, slots=True)
class Dropped:
    """Why a record cannot be used."""

    cause: DropCause
    detail: str


class DropCounter:
    """Counts used and dropped records of one dataset, and stops the run when too many are dropped.

    Args:
        name: dataset, for messages.
        max_dropped_share: DataError above this share, judged once `minimum_records` have been seen.
        minimum_records: seen before the share is judged.
        counts: (1 + number of causes,) int64 to count in: used, then one place per cause. Shared memory lets the main
            process read what loader workers count.
    """

    def __init__(
        self, name: str, max_dropped_share: float = 0.1, minimum_records: int = 100, counts: Tensor | None = None
    ) -> None:
        self.name = name
        self._max_dropped_share = max_dropped_share
        self._minimum_records = minimum_records
        self._counts = (empty_counts() if counts is None else counts).numpy()

    def keep(self) -> None:
        self._counts[0] += 1

    def drop(self, record: RawRecord, dropped: Dropped) -> None:
        """Count one dropped record and name it in the log (the first few of each dataset).

        Raises:
            DataError: the dropped share is above the limit.
        """
        self._counts[1 + DROP_CAUSES.index(dropped.cause)] += 1
        where = f"{record['__url__']} key {record['__key__']}"
        num_dropped = int(self._counts[1:].sum())
        if num_dropped <= _LOGGED_DROPS:
            logger.warning("%s: dropped (%s: %s) %s", self.name, dropped.cause, dropped.detail, where)
        num_seen = num_dropped + int(self._counts[0])
        if num_seen >= self._minimum_records and num_dropped > self._max_dropped_share * num_seen:
            causes = ", ".join(
                f"{count} {cause}" for cause, count in self.as_dict().items() if count and cause != "used"
            )
            raise DataError(
                f"{num_dropped} of {num_seen} records of {self.name} cannot be used ({causes}); allowed share is "
                f"{self._max_dropped_share:g}; last: {dropped.detail}",
                where=where,
                fix="repack the data (`blip2train data pack ... validate_images=true`) or raise data.max_dropped_share",
            )

    def as_dict(self) -> dict[str, int]:
        return counts_to_dict(self._counts.tolist())


def empty_counts(*leading: int) -> Tensor:
    """Zeros (..., 1 + number of causes) for `DropCounter`."""
    return torch.zeros(*leading, 1 + len(DROP_CAUSES), dtype=torch.int64)


def counts_to_dict(counts: Sequence[int]) -> dict[str, int]:
    return dict(zip(("used", *DROP_CAUSES), counts, strict=True))


def to_sample(record: RawRecord, dataset: str, transform: Transform, generator: torch.Generator) -> Sample | Dropped:
    """Decode one record; caption (uniform over the non-empty ones) and augmentation are drawn from `generator`."""
    fields = _read_fields(record)
    if isinstance(fields, Dropped):
        return fields
    captions = _captions(fields)
    if not captions:
        return Dropped("no_caption", "neither captions in the JSON nor a txt file")
    usable = [caption for caption in captions if clean_caption(caption)]
    if not usable:
        return Dropped("empty_caption", f"nothing left of {captions[0]!r} after cleaning")
    # always drawn, so that the augmentation does not depend on the number of captions
    choice = int(torch.randint(1 << 31, (), generator=generator)) % len(usable)
    image = _read_image(record)
    if isinstance(image, Dropped):
        return image
    key = record["__key__"]
    return Sample(key, dataset, transform(image, generator), usable[choice], _image_id(fields, key))


def to_eval_item(record: RawRecord, transform: Transform) -> EvalItem | Dropped:
    """Decode one record with all its captions and questions, as written."""
    fields = _read_fields(record)
    if isinstance(fields, Dropped):
        return fields
    image = _read_image(record)
    if isinstance(image, Dropped):
        return image
    key = record["__key__"]
    try:
        questions = tuple(_question(row, f"{key}/{index}") for index, row in enumerate(fields.get("questions", ())))
    except (KeyError, TypeError, AttributeError) as error:
        return Dropped("bad_json", f"a question without {error}")
    known = ("captions", "caption", "image_id", "questions")
    return EvalItem(
        key=key,
        image_id=_image_id(fields, key),
        image=transform(image, None),
        captions=tuple(caption for caption in _captions(fields) if caption.strip()),
        questions=questions,
        extra={name: value for name, value in fields.items() if name not in known},
    )


def read_eval_items(
    urls: str | Sequence[str],
    transform: Transform,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    counter: DropCounter | None = None,
) -> Iterator[EvalItem]:
    """Read every record exactly once, in shard order: the finite stream that benchmarks use.

    Args:
        urls: shards.
        transform: normally an `EvalTransform`.
        limit: stop after this many records over all ranks.
        rank: takes records whose index is `rank` modulo `world_size`.
        world_size: number of readers that share the records.
        counter: counts what is used and dropped. By default the first record that cannot be used is an error: a
            benchmark that silently lacks an image is another benchmark.

    Raises:
        DataError: shards missing, a record that cannot be used (above the allowed share), or nothing left.
    """
    counter = counter or DropCounter(f"evaluation data {urls}", max_dropped_share=0.0, minimum_records=1)
    num_read = 0
    for index, record in enumerate(record for url in expand_urls(urls) for record in read_shard(url)):
        if index == limit:
            break
        num_read += 1
        if index % world_size != rank:
            continue
        item = to_eval_item(record, transform)
        if isinstance(item, Dropped):
            counter.drop(record, item)
            continue
        counter.keep()
        yield item
    if num_read == 0:
        raise DataError("no records to evaluate on", where=f"urls={urls}", fix="check the shards and the limit")


def _read_fields(record: RawRecord) -> dict[str, Any] | Dropped:
    """The record's JSON, with a plain txt beside the image taken as its caption."""
    fields: dict[str, Any] = {}
    if "json" in record:
        try:
            loaded = json.loads(record["json"])
        except ValueError as error:
            return Dropped("bad_json", str(error))
        if not isinstance(loaded, dict):
            return Dropped("bad_json", f"a JSON {type(loaded).__name__} where an object is expected")
        fields = loaded
    if "txt" in record and not _captions(fields):
        fields["captions"] = [record["txt"].decode("utf-8", errors="replace")]
    return fields


def _captions(fields: Mapping[str, Any]) -> list[str]:
    found = fields.get("captions", fields.get("caption", []))
    rows = [found] if isinstance(found, str) else found
    return [row for row in rows if isinstance(row, str)] if isinstance(rows, list) else []


def _image_id(fields: Mapping[str, Any], key: str) -> int:
    found = fields.get("image_id", key)
    fits = isinstance(found, str) or (isinstance(found, int) and abs(found) < 1 << 63)
    return to_image_id(found if fits else str(found))


def _read_image(record: RawRecord) -> Tensor | Dropped:
    data = next((record[extension] for extension in IMAGE_EXTENSIONS if extension in record), None)
    if data is None:
        return Dropped(
            "no_image", f"files of the record: {', '.join(name for name in record if name[0] != '_') or 'none'}"
        )
    try:
        return decode_image(data)
    except DataError as error:
        return Dropped("corrupt_image", error.found)


def _question(row: Mapping[str, Any], default_id: str) -> Question:
    return Question(
        question_id=str(row.get("question_id", default_id)),
        question=row["question"],
        answers=tuple(str(answer) for answer in row["answers"]),
        kind=str(row.get("kind", "")),
    )
