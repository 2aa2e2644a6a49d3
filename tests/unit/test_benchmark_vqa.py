"""VQA with a scripted model whose every answer is known, and with a real tiny language model row by row."""

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_world import (
    ScriptedStage2,
    identity,
    make_language_tokenizer,
    make_record,
    make_stage2,
    write_records,
)

from blip2train.benchmark.vqa import VqaBenchmark
from blip2train.data.sample import read_eval_items
from blip2train.errors import ConfigError, DataError
from blip2train.model.language_model.base import GenerationSettings

CPU = torch.device("cpu")
SEEN = ("red", "green", "blue", "blue", "gray", "green", "blue")


def _benchmark(urls: list[str], **changes: Any) -> VqaBenchmark:
    options: dict[str, Any] = {"prompt": "question : {question} answer :", "batch_size": 3}
    settings = GenerationSettings(max_new_tokens=3)
    return VqaBenchmark("tiny", urls, identity, make_language_tokenizer(), settings, **(options | changes))


@pytest.fixture
def urls(tmp_path: Path) -> list[str]:
    """Seven images; "color" has the truth as its answer, "trick" always the answer green."""
    records = []
    for index, color in enumerate(SEEN):
        questions: list[dict[str, Any]] = [
            {"question_id": f"{index}a", "question": "what is the color ?", "answers": [color], "kind": "color"}
        ]
        if index < 2:
            answers = ["green"] * 10
            questions.append({"question_id": f"{index}b", "question": "what ?", "answers": answers, "kind": "trick"})
        records.append(make_record(f"img{index}", color, [], questions=questions, told=color))
    return write_records(tmp_path, records)


def test_every_number_is_what_the_script_makes_it(urls: list[str]) -> None:
    result = _benchmark(urls, oracle=lambda extra: f"the square is {extra['told']}").run(ScriptedStage2(), CPU)
    metrics = result.metrics
    assert metrics["questions"] == 9
    assert metrics["vqa_accuracy"] == pytest.approx(100 * 8 / 9)  # the trick on the red image is missed
    assert metrics["vqa_accuracy/color"] == 100.0
    assert metrics["vqa_accuracy/trick"] == 50.0
    assert metrics["vqa_blind"] == pytest.approx(100 * 1 / 9)  # "red" is right for one image
    assert metrics["vqa_oracle"] == pytest.approx(100 * 8 / 9)
    assert metrics["chance"] == pytest.approx(100 * 4 / 9)  # green: two images and two tricks
    assert metrics["chance_by_kind"] == pytest.approx(100 * 5 / 9)  # blue for colors, green for tricks
    assert metrics["chance/color"] == pytest.approx(100 * 3 / 7)
    assert metrics["bridging_efficiency"] == pytest.approx(1.0)


def test_shuffled_answers_are_those_of_the_image_that_the_row_names(urls: list[str]) -> None:
    result = _benchmark(urls).run(ScriptedStage2(), CPU)
    color_of = {f"img{index}": color for index, color in enumerate(SEEN)}
    assert all(row["prediction"] == color_of[row["key"]] for row in result.predictions)
    assert all(row["shuffled_key"] != row["key"] for row in result.predictions)
    assert all(row["shuffled"] == color_of[row["shuffled_key"]] for row in result.predictions)
    right = [row["shuffled"] == row["answers"][0] for row in result.predictions]
    assert result.metrics["vqa_shuffled"] == pytest.approx(100 * sum(right) / len(right))


def test_answers_equal_asking_a_real_language_model_one_question_at_a_time(urls: list[str]) -> None:
    model = make_stage2().eval()
    tokenizer = make_language_tokenizer()
    rows = _benchmark(urls).run(model, CPU).predictions
    images = {item.key: item.image for item in read_eval_items(urls, identity)}
    settings = GenerationSettings(max_new_tokens=3, end_id=tokenizer.end_id)
    assert len({row["prediction"] for row in rows} | {row["blind"] for row in rows}) > 1
    for row in rows:
        ids, mask = tokenizer.encode([f"question : {row['question']} answer :"], 128, add_start=True)
        for field, key in (("prediction", row["key"]), ("shuffled", row["shuffled_key"]), ("blind", None)):
            pixels = None if key is None else images[key][None]
            assert row[field] == tokenizer.decode(model.generate(pixels, ids, mask, settings))[0].strip()


@pytest.mark.parametrize("window_size", [2, 3, 5, 100])
def test_windows_and_batches_change_only_who_is_shuffled_with_whom(urls: list[str], window_size: int) -> None:
    expected = _benchmark(urls).run(ScriptedStage2(), CPU)
    found = _benchmark(urls, window_size=window_size, batch_size=window_size).run(ScriptedStage2(), CPU)
    for row, other in zip(expected.predictions, found.predictions, strict=True):
        assert row["question_id"] == other["question_id"]
        assert row["prediction"] == other["prediction"]
        assert other["shuffled_key"] != other["key"]


def test_progress_counts_images_to_its_end(urls: list[str]) -> None:
    seen: list[tuple[int, int | None]] = []
    _benchmark(urls, window_size=3).run(ScriptedStage2(), CPU, lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (7, 7)]


def test_controls_can_be_left_out_and_a_single_image_has_no_shuffled_one(urls: list[str]) -> None:
    plain = _benchmark(urls, blind=False, shuffled=False).run(ScriptedStage2(), CPU).metrics
    assert not {"vqa_blind", "vqa_shuffled", "vqa_oracle", "bridging_efficiency"} & set(plain)
    single = _benchmark(urls, limit=1).run(ScriptedStage2(), CPU).metrics
    assert "vqa_shuffled" not in single
    assert "vqa_blind" in single


def test_a_question_in_two_records_of_one_image_counts_once(tmp_path: Path) -> None:
    question = {"question_id": "7", "question": "what ?", "answers": ["red"]}
    key, image, fields = make_record("a", "red", [], image_id=1, questions=[question])
    urls = write_records(tmp_path, [(key, image, fields), ("b", image, fields)])
    assert len(_benchmark(urls).run(ScriptedStage2(), CPU).predictions) == 1


def test_variants_of_accuracy(tmp_path: Path) -> None:
    answers = ["The Red.", "crimson", "scarlet"]
    questions = [{"question_id": "0", "question": "what ?", "answers": answers}]
    urls = write_records(tmp_path, [make_record("a", "red", [], questions=questions)])
    assert _benchmark(urls, variant="exact").run(ScriptedStage2(), CPU).metrics["vqa_accuracy"] == 100.0
    official = _benchmark(urls, variant="official").run(ScriptedStage2(), CPU).metrics["vqa_accuracy"]
    assert official == pytest.approx(100 * (1 / 3 + 1 / 3 + 0) / 3)


def test_shown_rows_alternate_right_and_wrong_within_the_budget(urls: list[str]) -> None:
    result = _benchmark(urls, num_pictures=4).run(make_stage2(), CPU)
    shown = [row for row in result.predictions if row.get("shown")]
    assert len(shown) == len(result.images) == 4
    assert {row["key"] for row in shown} == set(result.images)


@pytest.mark.parametrize("prompt", ["question : {} answer :", "{question} {image}", "question", "{question"])
def test_a_template_that_cannot_be_filled_is_refused_before_any_work(prompt: str) -> None:
    with pytest.raises(ConfigError, match="question"):
        _benchmark([], prompt=prompt)


def test_records_without_questions_or_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no question"):
        _benchmark(write_records(tmp_path / "a", [make_record("x", "red", [])])).run(ScriptedStage2(), CPU)
    questions = [{"question_id": "9", "question": "what ?", "answers": []}]
    urls = write_records(tmp_path / "b", [make_record("x", "red", [], questions=questions)])
    with pytest.raises(DataError, match="9"):
        _benchmark(urls).run(ScriptedStage2(), CPU)
