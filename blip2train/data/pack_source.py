"""Files a user has -> the rows that `data/pack.py` writes: JSONL captions beside images, and COCO-style JSON.

Implements no part of the paper. LAVIS has one dataset class per source; here a source is a dict from image name to
fields, and a new one is one more function like `read_jsonl`.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2train.data.shards import IMAGE_EXTENSIONS
from blip2train.errors import DataError

Fields = dict[str, Any]
"""The JSON of one record: captions, image_id, questions, and whatever else the source says."""

_NAMED_EXAMPLES = 10


@dataclass
class Skipped:
    """What was left out: counts by cause, and the first names of each."""

    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, cause: str, name: str) -> None:
        self.counts[cause] += 1
        if len(self.examples[cause]) < _NAMED_EXAMPLES:
            self.examples[cause].append(name)

    def merged(self, other: Skipped) -> Skipped:
        both = Skipped()
        for part in (self, other):
            for cause, count in part.counts.items():
                both.counts[cause] += count
                both.examples[cause] = (both.examples[cause] + part.examples[cause])[:_NAMED_EXAMPLES]
        return both


def read_jsonl(path: Path, skipped: Skipped) -> dict[str, Fields]:
    """Image name -> fields, in file order; lines of the same image become one record with all their captions."""
    entries: dict[str, Fields] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                skipped.add("bad_json", f"{path.name} line {number}: {error}")
                continue
            name = _image_name(row)
            place = f"{path.name} line {number}"
            if name is None:
                skipped.add("bad_json", f"{place}: no object with `image` or `file_name`")
            elif name in entries:
                _merge(entries[name], _to_fields(row, place, skipped))
            else:
                entries[name] = _to_fields(row, place, skipped)
    return entries


def read_coco(path: Path, skipped: Skipped) -> dict[str, Fields]:
    """File name -> fields, in the order of `images`; counts captions without an image."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {row["id"]: str(row["file_name"]) for row in content["images"]}
        captions: dict[Any, list[str]] = {image_id: [] for image_id in names}
        for row in content["annotations"]:
            if row["image_id"] in captions:
                captions[row["image_id"]].append(row["caption"])
            else:
                skipped.add("caption_without_image", f"image_id {row['image_id']}: {row['caption']}")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"no COCO-style captions ({type(error).__name__}: {error})",
            where=str(path),
            fix="the file needs `images` with id and file_name, and `annotations` with image_id and caption",
        ) from error
    return {name: {"captions": captions[image_id], "image_id": image_id} for image_id, name in names.items()}


def locate(name: str, folders: Iterable[Path]) -> Path | None:
    """The first existing file of that name."""
    # normpath: "./a.jpg" and "a.jpg" are one file
    paths = (Path(os.path.normpath(folder / name)) for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def report_unused(folder: Path, used: set[Path], ignored: Iterable[Path], skipped: Skipped) -> None:
    """Count the files below `folder` that no line speaks of: images without a caption, and files that are no images."""
    known = {path.absolute() for path in used}
    others = tuple(str(path.absolute()) for path in ignored)
    for path in sorted(folder.absolute().rglob("*")):
        if path in known or str(path).startswith(others) or not path.is_file():
            continue
        is_image = path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
        skipped.add("image_without_caption" if is_image else "not_an_image", str(path.relative_to(folder.absolute())))


def _image_name(row: Any) -> str | None:
    name = row.get("image", row.get("file_name")) if isinstance(row, dict) else None
    return name if isinstance(name, str) and name else None


def _to_fields(row: Mapping[str, Any], place: str, skipped: Skipped) -> Fields:
    renamed = ("image", "file_name", "caption", "captions", "coco_id", "image_id", "qa", "questions")
    found = row.get("captions", row.get("caption", []))
    captions = [found] if isinstance(found, str) else list(found or [])
    fields: Fields = {"captions": [caption for caption in captions if isinstance(caption, str) and caption.strip()]}
    image_id = row.get("image_id", row.get("coco_id"))
    if image_id is not None:
        fields["image_id"] = image_id
    questions = []
    for entry in row.get("questions") or row.get("qa") or ():
        try:
            questions.append(_to_question(entry))
        except (KeyError, TypeError, AttributeError) as error:
            skipped.add("bad_question", f"{place}: {type(error).__name__} {error}")
    if questions:
        fields["questions"] = questions
    return fields | {name: value for name, value in row.items() if name not in renamed}


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


def _merge(fields: Fields, more: Fields) -> None:
    fields["captions"] += [caption for caption in more["captions"] if caption not in fields["captions"]]
    if "questions" in more:
        fields["questions"] = [*fields.get("questions", ()), *more["questions"]]
