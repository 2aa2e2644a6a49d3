"""A file of captions beside images -> entries: JSON lines, CSV, TSV or Parquet, a line at a time.

One line is one image with a caption or a list of them; the same image may have more lines. Everything else in a line
is kept. LAVIS reads none of these.

    JSONL      {"image": "a/1.jpg", "captions": ["...", "..."], "image_id": 5, "questions": [{"question", "answers"}]}
    CSV, TSV   a header line with the column names; TSV has no quoting, as Conceptual Captions is distributed
    Parquet    the same columns; captions as a string or a list of strings

The image is in the column `image`, `file_name`, `filepath` or `path`, the caption in `captions`, `caption`, `text` or
`title`, where no other column is named. `coco_id` is read as `image_id`, and `qa: [{question, answer_scores}]` as
questions.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2train.data.source.base import Fields, Skipped, captions_of, is_text
from blip2train.data.source.merge import Entry
from blip2train.errors import DataError

IMAGE_COLUMNS = ("image", "file_name", "filepath", "path")
CAPTION_COLUMNS = ("captions", "caption", "text", "title")
TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")

_LONGEST_FIELD = 1 << 27
_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold the image and its captions; None: the first usual name that is there."""

    image: str | None = None
    captions: str | None = None


def read_table(path: Path, columns: Columns, skipped: Skipped) -> Iterator[Entry]:
    """The entries of a file, in its order; what cannot be read is counted as "bad_json", "bad_text" or "bad_row".

    Raises:
        DataError: an unknown kind of file, or no column with images.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"captions in a {path.suffix or 'nameless kind of'} file",
            where=str(path),
            fix=f"give one that ends in {', '.join(TABLE_SUFFIXES)}",
        )
    for place, row in reader(path, columns, skipped):
        name = _first(row, columns.image, IMAGE_COLUMNS)
        if not isinstance(name, str) or not name:
            cause = "bad_json" if path.suffix.lower() == ".jsonl" else "bad_row"
            wanted = columns.image or " or ".join(f"`{column}`" for column in IMAGE_COLUMNS[:2])
            skipped.add(cause, f"{place}: no {wanted}")
            continue
        if not is_text(name):
            skipped.add("bad_text", place)
            continue
        yield os.path.normpath(name), _to_fields(row, columns, place, skipped)


def _read_jsonl(path: Path, columns: Columns, skipped: Skipped) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path.name} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                skipped.add("bad_json", f"{place}: {error}")
                continue
            if isinstance(row, dict):
                yield place, row
            else:
                skipped.add("bad_json", f"{place}: no object with an image")


def _read_csv(path: Path, columns: Columns, skipped: Skipped) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(_LONGEST_FIELD)
    # surrogates mark bytes that are no UTF-8, so that one broken caption costs one line and not the file
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        tab_separated: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        reader = csv.reader(file, **(tab_separated if path.suffix.lower() == ".tsv" else {}))
        header = next(reader, [])
        _check_columns(path, header, columns)
        while True:
            try:
                values = next(reader, None)
            except csv.Error as error:
                skipped.add("bad_row", f"{path.name} line {reader.line_num}: {error}")
                continue
            if values is None:
                return
            place = f"{path.name} line {reader.line_num}"
            if not values:
                continue
            if len(values) != len(header):
                skipped.add("bad_row", f"{place}: {len(values)} columns where the header has {len(header)}")
            elif not all(map(is_text, values)):
                skipped.add("bad_text", place)
            else:
                yield place, {name: value for name, value in zip(header, values, strict=True) if value}


def _read_parquet(path: Path, columns: Columns, skipped: Skipped) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, columns)
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name} row {number}", {name: _plain(value) for name, value in row.items()}
    except pyarrow.ArrowException as error:
        raise DataError(f"no Parquet file ({error})", where=str(path), fix="write or download it again") from error


def _check_columns(path: Path, header: list[str], columns: Columns) -> None:
    """DataError when no column holds the images, or the column that is named is not there."""
    missing = [name for name in (columns.image, columns.captions) if name is not None and name not in header]
    if not missing and (columns.image or any(name in header for name in IMAGE_COLUMNS)):
        return
    found = ", ".join(header[:8]) or "nothing"
    if any("://" in name or name.lower() == "url" for name in header):
        fix = "a list of urls is fetched first: configs/data/dataset/cc3m.yaml has the command"
    else:
        fix = "name the columns with image_column= and captions_column=; a CSV or TSV starts with a header line"
    wanted = " or ".join(missing or IMAGE_COLUMNS)
    raise DataError(f"no column {wanted}; the columns are: {found}", where=str(path), fix=fix)


def _first(row: Mapping[str, Any], named: str | None, usual: tuple[str, ...]) -> Any:
    names = usual if named is None else (named,)
    return next((row[name] for name in names if row.get(name) is not None), None)


def _to_fields(row: Mapping[str, Any], columns: Columns, place: str, skipped: Skipped) -> Fields:
    fields: Fields = {"captions": captions_of(_first(row, columns.captions, CAPTION_COLUMNS))}
    image_id = row.get("image_id", row.get("coco_id"))
    if image_id is not None:
        fields["image_id"] = image_id
    questions = []
    for entry in _list(row.get("questions")) or _list(row.get("qa")):
        try:
            questions.append(_to_question(entry))
        except (KeyError, TypeError, AttributeError) as error:
            skipped.add("bad_question", f"{place}: {type(error).__name__} {error}")
    if questions:
        fields["questions"] = questions
    used = {*_used(row, columns.image, IMAGE_COLUMNS), *_used(row, columns.captions, CAPTION_COLUMNS)}
    used |= {"coco_id", "image_id", "qa", "questions"}
    return fields | {name: value for name, value in row.items() if name not in used}


def _used(row: Mapping[str, Any], named: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    """The column that was read; of the usual names only the first that is there, so that `title` beside `caption`
    is kept."""
    if named is not None:
        return (named,)
    return next(((name,) for name in usual if row.get(name) is not None), ())


def _to_question(entry: Mapping[str, Any]) -> Fields:
    """A question with its answers; VQA scores (a third per person) become each answer as often as its score says."""
    if "answers" in entry:
        answers = list(entry["answers"])
    else:
        answers = [answer for answer, score in entry["answer_scores"].items() for _ in range(max(1, round(3 * score)))]
    question: Fields = {"question": entry["question"], "answers": answers}
    if "question_id" in entry:
        question["question_id"] = str(entry["question_id"])
    kind = entry.get("kind", entry.get("dataset"))
    return question if kind is None else question | {"kind": kind}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _plain(value: Any) -> Any:
    """A Parquet value as JSON can hold it."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
