"""The fields of an undecoded record -> captions, questions and image id, or the one reason why they cannot be had.

Implements the record format: an image beside a JSON object, `{"captions": [...], "image_id": 285, "questions":
[{"question_id", "question", "answers": [...], "kind"}], ...}`. Only `captions` is needed for training; `image_id`
defaults to the key. A lone `caption` string, or a plain `.txt` beside the image (img2dataset, LAION), is one caption.
LAVIS reads one annotation file per dataset, whose fields differ from dataset to dataset.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from blip2train.batch import Question, to_image_id
from blip2train.data.caption import clean_caption
from blip2train.data.drop import DROP_CAUSES, DropCause
from blip2train.data.shards import RawRecord
from blip2train.data.stored_tokens import DROPPED

_MAX_CHARACTERS = 10_000
_LETTER = re.compile("[0-9A-Za-z]")
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")


class UnusableError(Exception):
    """Why a record cannot be used; becomes its `Drop`."""

    def __init__(self, cause: DropCause, detail: str) -> None:
        self.cause, self.detail = cause, detail


def read_fields(record: RawRecord) -> dict[str, Any]:
    """The record's JSON, with a plain txt beside the image taken as its caption."""
    if "__broken__" in record:
        raise UnusableError(*record["__broken__"])
    if DROPPED in record:
        raise _dropped_before(record[DROPPED])
    fields: dict[str, Any] = {}
    if "json" in record:
        try:
            loaded = json.loads(record["json"])
        except UnicodeDecodeError as error:
            raise UnusableError("bad_text", f"JSON that is not UTF-8: {error.reason} at {error.start}") from error
        except (ValueError, RecursionError) as error:
            raise UnusableError("bad_json", str(error)) from error
        if not isinstance(loaded, dict):
            raise UnusableError("bad_json", f"a JSON {type(loaded).__name__} where an object is expected")
        fields = loaded
    if "txt" in record and not _given(fields):
        try:
            fields["captions"] = [record["txt"].decode("utf-8-sig")]
        except UnicodeDecodeError as error:
            raise UnusableError("bad_text", f"txt that is not UTF-8: {error.reason} at {error.start}") from error
    return fields


def _given(fields: Mapping[str, Any]) -> Any:
    """What stands for captions; None where nothing does, which pandas writes as null or NaN."""
    found = fields.get("captions", fields.get("caption"))
    return None if found == [] or (isinstance(found, float) and math.isnan(found)) else found


def all_captions(fields: Mapping[str, Any]) -> list[str]:
    """All captions as written; none where the record has none.

    Raises:
        UnusableError: something else than a text, or a list of texts.
    """
    found = _given(fields)
    if found is None:
        return []
    rows = found if isinstance(found, list) else [found]
    for row in rows:
        if not isinstance(row, str):
            raise UnusableError("bad_json", f"captions of type {type(found).__name__} with a {type(row).__name__}")
    return rows


def usable_captions(fields: Mapping[str, Any]) -> list[str]:
    """The captions that say something; one bad caption does not cost a record that has good ones.

    Raises:
        UnusableError: none is left.
    """
    usable, refused = judge_captions(fields)
    if not usable:
        raise refused[0] if refused else UnusableError("no_caption", "neither captions in the JSON nor a txt file")
    return usable


def judge_captions(fields: Mapping[str, Any]) -> tuple[list[str], list[UnusableError]]:
    """The captions that say something, and what is wrong with the others."""
    found = _given(fields)
    rows = found if isinstance(found, list) else [] if found is None else [found]
    usable, refused = [], []
    for row in rows:
        try:
            if not isinstance(row, str):
                raise UnusableError("bad_json", f"a caption of type {type(row).__name__}")
            check_text(row)
            text = row[:_MAX_CHARACTERS]
            # nearly every caption has a letter that no cleaning takes; cleaning all five costs a tenth of a decode
            if not _LETTER.search(text, 0, 50) and not _says_something(clean_caption(text)):
                raise UnusableError("empty_caption", f"nothing left of {text!r} after cleaning")
            usable.append(text)
        except UnusableError as error:
            refused.append(error)
    return usable, refused


def check_text(text: str) -> None:
    """Refuse what no tokenizer takes: half surrogate pairs (JSON can spell them), and NUL, which is binary data."""
    if "\0" in text:
        raise UnusableError("bad_text", f"a NUL character in {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableError("bad_text", f"half a surrogate pair in {text!r}") from error


def _says_something(text: str) -> bool:
    return (text.isascii() and bool(text.strip())) or any(unicodedata.category(c) not in _INVISIBLE for c in text)


def image_id_of(fields: Mapping[str, Any], key: str) -> int:
    found = fields.get("image_id", key)
    fits = isinstance(found, str) or (isinstance(found, int) and abs(found) < 1 << 63)
    return to_image_id(found if fits else str(found))


def read_questions(fields: Mapping[str, Any], key: str) -> tuple[Question, ...]:
    try:
        questions = tuple(_question(row, f"{key}/{index}") for index, row in enumerate(fields.get("questions") or ()))
    except (KeyError, TypeError, AttributeError) as error:
        raise UnusableError("bad_json", f"a question without {error}") from error
    for question in questions:
        check_text(question.question)
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


def _dropped_before(content: bytes) -> UnusableError:
    """The reason that a feature cache holds in the place of a record."""
    try:
        cause, detail = json.loads(content)
    except (ValueError, TypeError) as error:
        return UnusableError("bad_json", f"a feature cache's note on a dropped record: {error}")
    return UnusableError(cause if cause in DROP_CAUSES else "bad_json", str(detail))
