"""Prediction rows -> the examples a reader looks at: captions, answers and retrieved images, right ones and wrong ones.

Benchmarks mark the rows whose pictures they keep (`shown`); here some of them are chosen, right and wrong by turns.
LAVIS writes predictions to a JSON file and stops there.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2train.report.collect import Evaluation

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One card: a picture with lines of text; `right` is None where nobody knows."""

    picture: str
    title: str
    right: bool | None
    notes: Sequence[tuple[str, str]] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Ranking:
    """One retrieval query and its best five.

    Args:
        picture: of the query, or the one that a text query was written for.
        text: of the query, or one that belongs to an image query.
        rank: of the best right candidate, from 1.
        entries: (picture or text, is it right), best first.
    """

    picture: str
    text: str
    rank: int
    entries: Sequence[tuple[str, bool]]

    @property
    def right(self) -> bool:
        return self.rank == 1


def caption_examples(evaluation: Evaluation, count: int) -> list[Example]:
    """Captions with references; right means that the judge found every statement true."""
    rows = _mixed(_shown(evaluation), _caption_right, count)
    return [
        Example(
            _picture(evaluation, row["key"]),
            row["prediction"] or "(nothing)",
            _caption_right(row) if "verdict" in row else None,
            (("reference", max(row["references"], key=len)), ("CIDEr", f"{row['cider']:.2f}")),
        )
        for row in rows
    ]


def question_examples(evaluation: Evaluation, count: int) -> list[Example]:
    """Questions with the model's answer, the truth, and what the controls answered."""
    examples = []
    for row in _mixed(_shown(evaluation), _answer_right, count):
        notes = [("answer", row["prediction"] or "(nothing)"), ("truth", _truth(row["answers"]))]
        controls = (("no image", "blind"), ("other image", "shuffled"))
        notes += [(name, row[key] or "(nothing)") for name, key in controls if key in row]
        picture = _picture(evaluation, row["key"])
        examples.append(Example(picture, row["question"], _answer_right(row), tuple(notes)))
    return examples


def text_to_image(evaluation: Evaluation, count: int) -> list[Ranking]:
    """Texts with the five images ranked best for each."""
    rows = _mixed(_shown(evaluation, "text_to_image"), _ranked_first, count)
    return [
        Ranking(
            _picture(evaluation, row["key"]),
            row["text"],
            row["rank"],
            [(_picture(evaluation, entry["key"]), entry["right"]) for entry in row["retrieved"]],
        )
        for row in rows
    ]


def image_to_text(evaluation: Evaluation, count: int) -> list[Ranking]:
    """Images with the five texts ranked best for each."""
    rows = _mixed(_shown(evaluation, "image_to_text"), _ranked_first, count)
    return [
        Ranking(
            _picture(evaluation, row["key"]),
            row["captions"][0],
            row["rank"],
            [(entry["text"], entry["right"]) for entry in row["retrieved"]],
        )
        for row in rows
    ]


def _shown(evaluation: Evaluation, direction: str | None = None) -> list[Row]:
    rows = [row for row in evaluation.predictions if row.get("shown") and row["key"] in evaluation.pictures]
    return [row for row in rows if direction is None or row["direction"] == direction]


def _mixed(rows: Sequence[Row], is_right: Callable[[Row], bool], count: int) -> list[Row]:
    """Right and wrong by turns while both last, `count` in all."""
    right = [row for row in rows if is_right(row)]
    wrong = [row for row in rows if not is_right(row)]
    paired = [row for pair in zip(right, wrong, strict=False) for row in pair]
    matched = len(paired) // 2
    return (paired + right[matched:] + wrong[matched:])[:count]


def _caption_right(row: Row) -> bool:
    """By the judge where there is one, else at least half of a perfect match with the references."""
    verdict = row.get("verdict", {})
    return bool(verdict["true"] >= 1.0) if "true" in verdict else bool(row["cider"] >= 1.0)


def _answer_right(row: Row) -> bool:
    return bool(row["prediction_accuracy"] >= 0.5)


def _ranked_first(row: Row) -> bool:
    return bool(row["rank"] == 1)


def _truth(answers: Sequence[str]) -> str:
    distinct = sorted(set(answers), key=lambda answer: -answers.count(answer))
    return ", ".join(distinct[:3]) + (", ..." if len(distinct) > 3 else "")


def _picture(evaluation: Evaluation, key: str) -> str:
    return picture_uri(evaluation.pictures[key])


def picture_uri(path: Path) -> str:
    """A JPEG file as a data URI, so that the page needs no other file."""
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
