"""Captioning: scores against the reference scorer, the shuffled control, the judge, and one image at a time."""

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
from pycocoevalcap.cider.cider import Cider

from blip2train.benchmark.captioning import CaptioningBenchmark
from blip2train.data.sample import read_eval_items
from blip2train.errors import DataError
from blip2train.model.language_model.base import GenerationSettings

CPU = torch.device("cpu")
SEEN = ("red", "green", "blue", "blue", "gray", "green", "blue")


def _benchmark(urls: list[str], **changes: Any) -> CaptioningBenchmark:
    options: dict[str, Any] = {"batch_size": 3, "judge": _judge}
    settings = GenerationSettings(max_new_tokens=4)
    return CaptioningBenchmark("tiny", urls, identity, make_language_tokenizer(), settings, **(options | changes))


def _judge(caption: str, extra: Any) -> dict[str, float]:
    verdict = {"true": float(caption == extra["told"])}
    return verdict | ({"true_blue": verdict["true"]} if extra["told"] == "blue" else {})


@pytest.fixture
def urls(tmp_path: Path) -> list[str]:
    return write_records(
        tmp_path,
        [make_record(f"img{i}", color, [color, f"a {color} square"], told=color) for i, color in enumerate(SEEN)],
    )


def test_scores_are_those_of_the_coco_scorer_and_the_judge(urls: list[str]) -> None:
    result = _benchmark(urls).run(ScriptedStage2(), CPU)
    assert [row["prediction"] for row in result.predictions] == list(SEEN)
    references = {index: [color, f"a {color} square"] for index, color in enumerate(SEEN)}
    for field, suffix in (("prediction", ""), ("shuffled", "_shuffled")):
        given = {index: [row[field]] for index, row in enumerate(result.predictions)}
        overall, per_image = Cider().compute_score(references, given)
        assert result.metrics[f"caption_cider{suffix}"] == pytest.approx(overall)
        assert [row[f"cider{suffix}"] for row in result.predictions] == pytest.approx(list(per_image), abs=1e-4)
    assert result.metrics["caption_true"] == 100.0
    assert result.metrics["caption_true_blue"] == 100.0
    right = [row["shuffled"] == color for row, color in zip(result.predictions, SEEN, strict=True)]
    assert result.metrics["caption_true_shuffled"] == pytest.approx(100 * sum(right) / len(right))
    assert result.metrics["caption_cider"] > result.metrics["caption_cider_shuffled"]
    assert {"caption_bleu_1", "caption_bleu_4", "caption_rouge_l"} <= set(result.metrics)


def test_shuffled_captions_belong_to_the_image_that_the_row_names(urls: list[str]) -> None:
    rows = _benchmark(urls).run(ScriptedStage2(), CPU).predictions
    caption_of = {row["key"]: row["prediction"] for row in rows}
    assert all(row["shuffled_key"] != row["key"] for row in rows)
    assert all(row["shuffled"] == caption_of[row["shuffled_key"]] for row in rows)
    assert sorted(row["shuffled_key"] for row in rows) == sorted(caption_of)


def test_captions_equal_generating_for_one_image_at_a_time(urls: list[str]) -> None:
    model = make_stage2().eval()
    tokenizer = make_language_tokenizer()
    settings = GenerationSettings(max_new_tokens=4, end_id=tokenizer.end_id)
    for prompt in ("", "a square"):
        rows = _benchmark(urls, prompt=prompt, blind=True).run(model, CPU).predictions
        ids, mask = tokenizer.encode([prompt], 32, add_start=True)
        for row, item in zip(rows, read_eval_items(urls, identity), strict=True):
            assert row["prediction"] == tokenizer.decode(model.generate(item.image[None], ids, mask, settings))[0]
            assert row["blind"] == tokenizer.decode(model.generate(None, ids, mask, settings))[0]


def test_blind_caption_is_the_same_for_all_and_scored(urls: list[str]) -> None:
    result = _benchmark(urls, blind=True).run(ScriptedStage2(), CPU)
    assert {row["blind"] for row in result.predictions} == {"red"}
    assert 0 < result.metrics["caption_cider_blind"] < result.metrics["caption_cider"]


def test_controls_can_be_left_out_and_one_image_has_no_shuffled_one(urls: list[str]) -> None:
    plain = _benchmark(urls, shuffled=False, judge=None).run(ScriptedStage2(), CPU)
    assert not [key for key in plain.metrics if key.endswith("_shuffled") or key.startswith("caption_true")]
    assert "caption_cider_shuffled" not in _benchmark(urls, limit=1).run(ScriptedStage2(), CPU).metrics


def test_records_of_one_image_are_scored_once_against_all_references(tmp_path: Path) -> None:
    key, image, fields = make_record("a", "red", ["red"], image_id=4, told="red")
    more = fields | {"captions": ["a red square"]}
    urls = write_records(
        tmp_path, [(key, image, fields), make_record("z", "blue", ["blue"], told="blue"), ("b", image, more)]
    )
    rows = _benchmark(urls).run(ScriptedStage2(), CPU).predictions
    assert [row["key"] for row in rows] == ["a", "z"]
    assert rows[0]["references"] == ["red", "a red square"]


def test_pictures_show_the_best_and_the_worst(urls: list[str]) -> None:
    result = _benchmark(urls, num_pictures=3).run(make_stage2(), CPU)
    shown = [row for row in result.predictions if row.get("shown")]
    assert {row["key"] for row in shown} == set(result.images)
    assert len(shown) == 3
    ciders = [row["cider"] for row in result.predictions]
    assert {min(ciders), max(ciders)} <= {row["cider"] for row in shown}


def test_an_image_without_references_is_refused(tmp_path: Path) -> None:
    urls = write_records(tmp_path, [make_record("bare", "red", [], told="red")])
    with pytest.raises(DataError, match="bare"):
        _benchmark(urls).run(ScriptedStage2(), CPU)
