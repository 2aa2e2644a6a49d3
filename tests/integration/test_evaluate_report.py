"""Run folder -> evaluation -> report: each rebuilt from what the step before wrote, and from nothing else."""

import re
import shutil
from pathlib import Path

import pytest

from blip2train.cli.config import compose
from blip2train.cli.evaluate import evaluate
from blip2train.errors import ConfigError
from blip2train.report.html import build_report
from blip2train.report.summary import summarize, write_summary
from blip2train.run_dir import RunDir, read_json


@pytest.fixture(scope="module")
def evaluated(laboratory, stage1_run: RunDir, stage2_run: RunDir, tmp_path_factory) -> tuple[RunDir, RunDir]:
    """Copies that were moved to another folder: a run folder holds no path to itself."""
    moved = []
    for run in (stage1_run, stage2_run):
        folder = tmp_path_factory.mktemp("moved") / run.path.name
        shutil.copytree(run.path, folder)
        evaluate(compose("evaluate", [f"run={folder}", f"paths.data={laboratory.data}"]), RunDir(folder))
        moved.append(RunDir(folder))
    return moved[0], moved[1]


def test_every_benchmark_of_the_run_is_written(evaluated: tuple[RunDir, RunDir]) -> None:
    first, second = evaluated
    assert first.benchmarks() == ["microworld_retrieval", "microworld_retrieval_out"]
    assert len(second.benchmarks()) == 4
    metrics, predictions = first.read_eval("microworld_retrieval")
    assert metrics["candidates"] == 12 and metrics["chance"] == pytest.approx(100 / 12, rel=0.01)
    assert predictions


def test_summary_has_the_promised_keys(evaluated: tuple[RunDir, RunDir], tmp_path: Path) -> None:
    summary = read_json(write_summary(*evaluated, tmp_path, 12.3, {"train": 5.0}))
    stage1 = {"text_recall@1", "image_recall@1", "text_recall@1_itm", "image_recall@1_itm", "candidates", "chance"}
    stage2 = {"vqa_accuracy", "vqa_blind", "vqa_shuffled", "caption_cider", "caption_cider_shuffled"}
    assert summary["seconds"] == 12.3
    for where in (summary, summary["out_of_domain"]):
        assert stage1 <= set(where["stage1"]) and stage2 <= set(where["stage2"])
    assert stage1 | stage2 <= set(summary["out_of_domain"])


def test_report_is_one_file_without_outside_resources(evaluated: tuple[RunDir, RunDir], tmp_path: Path) -> None:
    text = build_report(list(evaluated), tmp_path, "both stages").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?:https?:)?//[^"]+"', text)
    assert text.count("data:image") > 10 and "<svg" in text


def test_evaluating_twice_gives_the_same_numbers(laboratory, evaluated: tuple[RunDir, RunDir]) -> None:
    first, _ = evaluated
    before, _ = first.read_eval("microworld_retrieval")
    chosen = [f"run={first.path}", "benchmark=microworld_retrieval", f"paths.data={laboratory.data}"]
    assert evaluate(compose("evaluate", chosen), first)["microworld_retrieval"] == pytest.approx(before)


def test_benchmark_of_the_other_stage_is_refused(laboratory, stage1_run: RunDir) -> None:
    chosen = compose("evaluate", [f"run={stage1_run.path}", "benchmark=microworld_vqa"])
    with pytest.raises(ConfigError, match="microworld_vqa"):
        evaluate(chosen, stage1_run)


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run in"):
        RunDir.open(tmp_path)


def test_report_summary_fits_any_runs(evaluated: tuple[RunDir, RunDir], tmp_path: Path) -> None:
    both = read_json(summarize(evaluated, tmp_path / "both"))
    assert both["stage1"]["candidates"] == 12 and both["seconds"] > 0
    alone = read_json(summarize(evaluated[:1], tmp_path / "alone"))
    (scores,) = alone["runs"].values()
    assert scores["microworld_retrieval"]["candidates"] == 12
