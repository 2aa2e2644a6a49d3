"""GQA's questions -> one row per image with its questions.

Official layout, from https://cs.stanford.edu/people/dorarad/gqa/download.html (questions 1.2, images):

    testdev_balanced_questions.json   {"201307251": {"imageId": "n161313", "question": "Is it overcast?",
                                       "answer": "no", "fullAnswer", "isBalanced",
                                       "types": {"structural", "semantic", "detailed"}, "groups",
                                       "entailed", "equivalent", "semantic", "semanticStr", "annotations"}}
    train_balanced_questions.json, val_balanced_questions.json, train_all_questions/train_all_questions_0.json, ...
    test_balanced_questions.json      without answers
    images/2405722.jpg, images/n161313.jpg

The kind of a question is its structural type ("verify", "query", "choose", "logical", "compare"). An `imageId` that
is a number is Visual Genome's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip2train.data.source.base import Fields, Folders, Row, Skipped, existing_file, existing_folder, safe_key, sha256
from blip2train.data.source.json_file import load_json, opens_with, wrong_file
from blip2train.data.source.visual_genome import VISUAL_GENOME_FOLDERS, VISUAL_GENOME_ID

_EXPECTED = "a file of GQA's questions 1.2, such as testdev_balanced_questions.json"
_KEPT = ("imageId", "question", "answer", "fullAnswer", "isBalanced", "structural")


class GqaSource:
    """Questions of one file, or of some (`train_all_questions` has ten); of each only what is packed is held.

    Args:
        images: the folder `images`, or the one above it.
        files: the JSON files.

    Raises:
        DataError: a file or folder is missing, or a JSON is another one.
    """

    def __init__(self, images: str | Path, files: Sequence[str | Path]) -> None:
        self.skipped = Skipped()
        self._folders = Folders(existing_folder(images), ("images", *VISUAL_GENOME_FOLDERS))
        self._paths = [existing_file(path) for path in files]
        self._by_image: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for path in self._paths:
            content = load_json(path, _slim_question) if opens_with(path) == "{" else {}
            first = next(iter(content.values()), None)
            if not isinstance(first, dict) or "imageId" not in first:
                raise wrong_file(path, _EXPECTED)
            for question_id, row in content.items():
                self._by_image.setdefault(str(row["imageId"]), []).append((question_id, row))

    def identity(self) -> dict[str, Any]:
        place = {"images": str(self._folders.root), "annotations": [str(path) for path in self._paths]}
        return {"kind": "gqa", **place, "sha256": [sha256(path) for path in self._paths]}

    def count(self) -> int | None:
        return len(self._by_image)

    def rows(self) -> Iterator[Row]:
        """In the order of the images' first questions."""
        self.skipped = self.skipped.fresh()
        for image_id, found in self._by_image.items():
            name = f"{image_id}.jpg"
            questions = [_to_question(question_id, row) for question_id, row in found]
            fields: Fields = {"questions": questions, "image_id": gqa_image_id(image_id)}
            yield Row(safe_key(image_id), name, fields, self._folders.candidates(name))

    def notes(self) -> dict[str, Any]:
        return {}


def gqa_image_id(raw: str) -> str:
    """GQA's id as one that no other data set uses for another image; equal to Visual Genome's where it is its image."""
    return f"{VISUAL_GENOME_ID}{raw}" if raw.isdecimal() else f"gqa/{raw}"


def _to_question(question_id: str, row: dict[str, Any]) -> Fields:
    question: Fields = {"question_id": question_id, "question": row["question"], "answers": []}
    if row.get("answer") is not None:
        question["answers"] = [row["answer"]]
    if "structural" in row:
        question["kind"] = row["structural"]
    return question | ({"full_answer": row["fullAnswer"]} if row.get("fullAnswer") else {})


def _slim_question(value: dict[str, Any]) -> dict[str, Any]:
    """A question without its program and its relations to others, which are most of the file."""
    if "imageId" not in value:
        return value
    structural = (value.get("types") or {}).get("structural")
    slim = {name: value[name] for name in _KEPT if name in value}
    return slim | ({"structural": structural} if structural else {})
