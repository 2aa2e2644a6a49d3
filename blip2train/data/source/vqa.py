"""VQAv2 and OK-VQA: questions and answers about COCO images -> one row per image with its questions.

Official layout, from https://visualqa.org/download.html and https://okvqa.allenai.org/download.html:

    v2_OpenEnded_mscoco_val2014_questions.json   {"data_type": "mscoco", "data_subtype": "val2014", "questions":
                                                  [{"image_id", "question", "question_id"}], "info", "license", ...}
    v2_mscoco_val2014_annotations.json           {"data_subtype", "annotations": [{"question_id", "image_id",
                                                  "question_type", "answer_type", "multiple_choice_answer",
                                                  "answers": [{"answer", "answer_confidence", "answer_id"}]}]}
    v2_OpenEnded_mscoco_test2015_questions.json  and test-dev2015: the answers are not public
    OpenEnded_mscoco_val2014_questions.json, mscoco_val2014_annotations.json     OK-VQA; answers also have
                                                  "raw_answer", and "question_types" names the ten categories
    val2014/COCO_val2014_000000262148.jpg        images, as in COCO

The kind of a question is VQAv2's answer type ("yes/no", "number", "other") or OK-VQA's category, by which the
accuracies are reported. OK-VQA's `answer` is the stemmed form that its evaluator compares; the words as typed stay in
`raw_answers`. LAVIS reads its own lists instead (see `data/source/lavis.py`) and wants its four files in one order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip2train.data.source.base import Fields, Folders, Row, Skipped, existing_file, existing_folder, sha256
from blip2train.data.source.coco import COCO_FOLDERS, coco_candidates
from blip2train.data.source.json_file import load_json, opens_with, wrong_file
from blip2train.errors import DataError

_EXPECTED = "v2_OpenEnded_mscoco_*_questions.json and v2_mscoco_*_annotations.json (OK-VQA: the same without v2_)"


class VqaSource:
    """Questions of one split with their answers.

    Args:
        images: folder of the files, or the one above `train2014`, `val2014` and `test2015`.
        files: questions and annotations in any order; of a test split the questions alone.
        kind: "vqav2" or "okvqa".

    Raises:
        DataError: a file or folder is missing, the JSON is another one, or the answers of a split that has public
            ones are not given.
    """

    def __init__(self, images: str | Path, files: Sequence[str | Path], *, kind: str = "vqav2") -> None:
        self.skipped = Skipped()
        self._folders = Folders(existing_folder(images), COCO_FOLDERS)
        self._paths, self._kind = [existing_file(path) for path in files], kind
        questions, annotations = self._load()
        self._subtype = str(questions.get("data_subtype", ""))
        if annotations is None and not self._subtype.startswith("test"):
            raise DataError(
                f"the questions of {self._subtype or 'an unnamed split'} without their answers",
                where=", ".join(map(str, self._paths)),
                fix=f"give both files: {_EXPECTED}",
            )
        if annotations and str(annotations.get("data_subtype", self._subtype)) != self._subtype:
            raise DataError(
                f"questions of {self._subtype} and answers of {annotations['data_subtype']}",
                where=", ".join(map(str, self._paths)),
                fix="give the two files of one split",
            )
        self._questions: list[dict[str, Any]] = questions["questions"]
        categories = (annotations or {}).get("question_types")
        self._categories: dict[str, str] = categories if isinstance(categories, dict) else {}
        self._answers = {row["question_id"]: row for row in annotations["annotations"]} if annotations else None

    def identity(self) -> dict[str, Any]:
        place = {"images": str(self._folders.root), "annotations": sorted(map(str, self._paths))}
        return {"kind": self._kind, **place, "sha256": sorted(map(sha256, self._paths))}

    def count(self) -> int | None:
        answers = self._answers
        return len({row["image_id"] for row in self._questions if answers is None or row["question_id"] in answers})

    def rows(self) -> Iterator[Row]:
        """In the order of the images' first questions; questions without answers, and the reverse, are counted."""
        self.skipped = self.skipped.fresh()
        by_image: dict[int, list[Fields]] = {}
        for row in self._questions:
            try:
                question, image_id = self._to_question(row), int(row["image_id"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"a question without {error}", where=", ".join(map(str, self._paths)), fix=f"give {_EXPECTED}"
                ) from error
            if question is not None:
                by_image.setdefault(image_id, []).append(question)
        known = {row["question_id"] for row in self._questions}
        for question_id in self._answers or ():
            if question_id not in known:
                self.skipped.add("answers_without_question", f"question_id {question_id}")
        subtype = self._subtype.replace("test-dev", "test")
        for image_id, questions in by_image.items():
            stem = f"COCO_{subtype}_{image_id:012d}"
            fields: Fields = {"questions": questions, "image_id": image_id, "split": self._subtype}
            yield Row(stem, f"{stem}.jpg", fields, coco_candidates(self._folders, f"{stem}.jpg"))

    def notes(self) -> dict[str, Any]:
        return {}

    def _load(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """(questions file, annotations file), told apart by what is in them."""
        found: dict[str, dict[str, Any]] = {}
        for path in self._paths:
            content = load_json(path, _slim_answer) if opens_with(path) == "{" else {}
            part = next((name for name in ("questions", "annotations") if isinstance(content.get(name), list)), None)
            rows = content.get(part) if part else None
            if part is None or part in found or not rows or "question_id" not in rows[0]:
                raise wrong_file(path, _EXPECTED)
            found[part] = content
        if "questions" not in found:
            raise DataError(
                "no file of questions", where=", ".join(map(str, self._paths)), fix=f"give both files: {_EXPECTED}"
            )
        return found["questions"], found.get("annotations")

    def _to_question(self, row: dict[str, Any]) -> Fields | None:
        question: Fields = {"question_id": str(row["question_id"]), "question": row["question"], "answers": []}
        if self._answers is None:
            return question
        annotation = self._answers.get(row["question_id"])
        if annotation is None:
            self.skipped.add("question_without_answers", f"question_id {row['question_id']}")
            return None
        question["answers"] = [answer for answer, _ in annotation["answers"]]
        raw = [raw for _, raw in annotation["answers"] if raw is not None]
        question_type = annotation.get("question_type")
        more = {
            "kind": self._categories.get(question_type or "", annotation.get("answer_type")),
            "question_type": question_type,
            "raw_answers": raw or None,
        }
        return question | {name: value for name, value in more.items() if value is not None}


def _slim_answer(value: dict[str, Any]) -> Any:
    """A person's answer as (answer, answer as typed): the files hold millions of them."""
    is_answer = "answer" in value and "question_id" not in value
    return (value["answer"], value.get("raw_answer")) if is_answer else value
