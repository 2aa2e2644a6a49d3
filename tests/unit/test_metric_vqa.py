import json
from pathlib import Path
from typing import Any

import pytest

from blip2train.errors import ConfigError, DataError
from blip2train.metric.vqa import (
    answer_accuracy,
    exact_match_accuracy,
    normalize_answer,
    normalize_words,
    strip_punctuation,
    vqa_accuracy,
)

FILES = {
    "majority": ("vqav2_mini_annotations", "vqav2_mini_results_majority"),
    "first_annotator": ("vqav2_mini_annotations", "vqav2_mini_results_first_annotator"),
    "majority_decorated": ("vqav2_mini_annotations", "vqav2_mini_results_majority_decorated"),
    "edge": ("edge_annotations", "edge_results"),
}
VARIANTS = {"official": "official_2021", "lavis": "lavis"}


def _load(shared_data: Path, name: str) -> Any:
    return json.loads((shared_data / "vqa" / f"{name}.json").read_text())


def test_normalisation_equals_the_official_code_on_its_whole_table(shared_data: Path) -> None:
    for row in _load(shared_data, "normalisation_table")["rows"]:
        text = row["input"]
        assert strip_punctuation(text) == row["punctuation_only"]
        assert normalize_words(text) == row["digit_article_only"]
        assert normalize_words(strip_punctuation(text)) == row["full"]
        assert normalize_answer(text) == row["full_after_evaluate_whitespace_cleanup"]


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("field", "group"), [("answer_type", "perAnswerType"), ("question_type", "perQuestionType")])
def test_accuracy_equals_the_evaluators_overall_and_by_type(
    shared_data: Path, case: str, variant: Any, field: str, group: str
) -> None:
    annotations = _load(shared_data, FILES[case][0])["annotations"]
    results = {row["question_id"]: row["answer"] for row in _load(shared_data, FILES[case][1])}
    expected = _load(shared_data, "expected")[case][VARIANTS[variant]]
    score = vqa_accuracy(
        [results[row["question_id"]] for row in annotations],
        [[answer["answer"] for answer in row["answers"]] for row in annotations],
        [row[field] for row in annotations],
        variant,
    )
    assert round(score.overall, 2) == expected["overall"]
    assert {kind: round(value, 2) for kind, value in score.per_kind.items()} == expected[group]


def test_every_edge_case_scores_as_the_evaluators_do(shared_data: Path) -> None:
    for row in _load(shared_data, "expected")["edge"]["per_question"]:
        for variant, key in VARIANTS.items():
            accuracy = answer_accuracy(row["prediction"], row["answers"], variant)  # type: ignore[arg-type]
            assert round(100 * accuracy, 2) == row[key], row["case"]


def test_the_official_score_leaves_unanimous_answers_as_they_are() -> None:
    assert answer_accuracy("Yes", ["yes"] * 10) == 0.0
    assert answer_accuracy("Yes", ["yes"] * 10, "lavis") == 1.0


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_is_the_mean_over_leaving_one_annotator_out(matches: int, accuracy: float) -> None:
    answers = ["red"] * matches + [f"other {index}" for index in range(10 - matches)]
    assert answer_accuracy("red", answers) == pytest.approx(accuracy)


def test_a_single_answer_is_matched_or_not() -> None:
    assert answer_accuracy("red", ["red"]) == 1.0
    assert answer_accuracy("blue", ["red"]) == 0.0


def test_more_than_32_periods_are_left_as_the_official_code_leaves_them() -> None:
    assert strip_punctuation("." * 40) == "." * 8


def test_exact_match_cleans_both_sides() -> None:
    assert exact_match_accuracy(["A cat.", "two dogs", "x"], [["cat"], ["Two dogs", "dogs"], ["y"]]) == pytest.approx(
        200 / 3
    )


def test_impossible_requests_are_errors() -> None:
    with pytest.raises(ConfigError):
        answer_accuracy("a", ["a"], "strict")  # type: ignore[arg-type]
    with pytest.raises(DataError):
        answer_accuracy("a", [])
    with pytest.raises(DataError):
        vqa_accuracy(["a"], [["a"], ["b"]])
    with pytest.raises(DataError):
        vqa_accuracy(["a"], [["a"]], kinds=["x", "y"])
    with pytest.raises(DataError):
        exact_match_accuracy([], [])
