import json
from pathlib import Path

import pytest

from blip2train.errors import DataError
from blip2train.metric.caption import caption_scores

NAMES = {
    "Bleu_1": "bleu_1",
    "Bleu_2": "bleu_2",
    "Bleu_3": "bleu_3",
    "Bleu_4": "bleu_4",
    "ROUGE_L": "rouge_l",
    "CIDEr": "cider",
}


def test_scores_equal_coco_captions_overall_and_per_image(shared_data: Path) -> None:
    folder = shared_data / "caption_metrics"
    annotations = json.loads((folder / "captions_val2014_1000_tokenized_refs.json").read_text())["annotations"]
    results = json.loads((folder / "captions_val2014_fakecap_results.json").read_text())
    references: dict[int, list[str]] = {}
    for row in annotations:
        references.setdefault(row["image_id"], []).append(row["caption"])
    candidates = {row["image_id"]: row["caption"] for row in results}
    per_image = json.loads((folder / "measured_per_image.json").read_text())
    order = [row["image_id"] for row in per_image]

    scores = caption_scores([candidates[image] for image in order], [references[image] for image in order])

    overall = json.loads((folder / "measured.json").read_text())["scores"]
    for theirs, ours in NAMES.items():
        assert scores.overall[ours] == pytest.approx(overall[theirs], abs=1e-9)
        for row, mine in zip(per_image, scores.per_image, strict=True):
            assert mine[ours] == pytest.approx(row[theirs], abs=1e-9)
    assert scores.cider_per_image == tuple(row["cider"] for row in scores.per_image)


def test_case_and_punctuation_do_not_matter() -> None:
    references = [["a dog runs on grass"], ["two red buses in a street"]]
    plain = caption_scores(["a dog runs on grass", "two red buses in a street"], references)
    loud = caption_scores(["A dog runs on grass.", "Two red buses, in a street!"], references)
    assert plain == loud
    assert plain.overall["bleu_4"] == pytest.approx(1.0)
    assert plain.overall["cider"] == pytest.approx(10.0)


def test_an_empty_caption_scores_nothing_and_spares_the_others() -> None:
    references = [["a dog runs on grass"], ["two red buses in a street"], ["a cat asleep on a sofa"]]
    scores = caption_scores(["", "two red buses in a street", "..."], references)
    assert scores.per_image[0]["cider"] == scores.per_image[0]["rouge_l"] == 0.0
    assert scores.per_image[1]["rouge_l"] == pytest.approx(1.0)
    assert scores.per_image[2]["cider"] == 0.0


def test_a_single_image_has_no_cider_because_no_word_is_rare() -> None:
    scores = caption_scores(["a dog runs on grass"], [["a dog runs on grass", "a dog"]])
    assert scores.overall["cider"] == 0.0
    assert scores.overall["bleu_1"] == pytest.approx(1.0)


def test_requests_that_cannot_be_scored_are_errors() -> None:
    with pytest.raises(DataError):
        caption_scores([], [])
    with pytest.raises(DataError):
        caption_scores(["a"], [["a"], ["b"]])
    with pytest.raises(DataError, match="no reference"):
        caption_scores(["a", "b"], [["a"], []])
