"""summary.json: exactly the keys that other programs read."""

import json
from pathlib import Path

import pytest

from blip2train.errors import ConfigError
from blip2train.report.summary import write_summary
from blip2train.run_dir import RunDir

RETRIEVAL = {
    "text_recall@1": 77.5,
    "text_recall@5": 99.0,
    "image_recall@1": 70.12345,
    "text_recall@1_itm": 76.0,
    "image_recall@1_itm": 68.0,
    "candidates": 200,
    "chance": 0.5,
    "image_recall@1_ceiling": 82.7,
}
CAPTION = {"caption_cider": 4.9, "caption_cider_shuffled": 1.2, "caption_true": 71.0, "caption_bleu_1": 0.9}
VQA = {"vqa_accuracy": 85.0, "vqa_blind": 30.0, "vqa_shuffled": 33.0, "vqa_oracle": 86.0, "chance": 12.0}


def _runs(tmp_path: Path) -> tuple[RunDir, RunDir]:
    stage1, stage2 = RunDir(tmp_path / "s1"), RunDir(tmp_path / "s2")
    for suffix, change in (("", 0.0), ("_out", -10.0)):
        stage1.write_eval(f"microworld_retrieval{suffix}", RETRIEVAL | {"text_recall@1": 77.5 + change}, [])
        stage2.write_eval(f"microworld_caption{suffix}", CAPTION, [])
        stage2.write_eval(f"microworld_vqa{suffix}", VQA | {"vqa_accuracy": 85.0 + change}, [])
    return stage1, stage2


def test_summary_holds_the_agreed_keys_nested_and_flat(tmp_path: Path) -> None:
    path = write_summary(*_runs(tmp_path), tmp_path / "out", 187.25, {"stage 1": 120.04, "stage 2": 40.0})
    summary = json.loads(path.read_text())
    assert list(summary) == ["seconds", "stage1", "stage2", "out_of_domain", "phases"]
    stage1 = {"text_recall@1", "image_recall@1", "text_recall@1_itm", "image_recall@1_itm", "candidates", "chance"}
    stage2 = {"vqa_accuracy", "vqa_blind", "vqa_shuffled", "caption_cider", "caption_cider_shuffled"}
    assert set(summary["stage1"]) == stage1 | {"image_recall@1_ceiling"}
    assert set(summary["stage2"]) == stage2 | {"vqa_oracle", "caption_true"}
    assert set(summary["out_of_domain"]) == {"stage1", "stage2"} | set(summary["stage1"]) | set(summary["stage2"])
    assert summary["stage1"]["candidates"] == 200
    assert summary["stage1"]["chance"] == 0.5
    assert summary["stage2"]["vqa_accuracy"] == 85.0
    assert summary["out_of_domain"]["vqa_accuracy"] == summary["out_of_domain"]["stage2"]["vqa_accuracy"] == 75.0
    assert summary["out_of_domain"]["stage1"]["text_recall@1"] == 67.5
    assert summary["phases"] == {"stage 1": 120.0, "stage 2": 40.0}


def test_a_missing_evaluation_names_the_command_that_makes_it(tmp_path: Path) -> None:
    stage1, stage2 = _runs(tmp_path)
    with pytest.raises(ConfigError, match=r"other was not evaluated.*microworld_vqa_out"):
        write_summary(stage1, stage2, tmp_path, 1.0, {}, vqa="other")


def test_a_missing_control_is_named(tmp_path: Path) -> None:
    stage1, stage2 = _runs(tmp_path)
    stage2.write_eval("microworld_vqa", {"vqa_accuracy": 85.0}, [])
    with pytest.raises(ConfigError, match="vqa_blind, vqa_shuffled"):
        write_summary(stage1, stage2, tmp_path, 1.0, {})
