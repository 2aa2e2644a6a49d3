"""The promises of the README, trained for real: minutes of CPU, so slow. Bars leave room below what seeds scored."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blip2train.run_dir import RunDir, read_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def command_line(*arguments: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "blip2train.cli.main", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_quickstart_learns_to_retrieve_answer_and_caption_held_out_scenes(tmp_path: Path) -> None:
    command_line("quickstart", "seed=3", cwd=tmp_path)
    summary = read_json(tmp_path / "outputs" / "quickstart" / "summary.json")
    stage1, stage2 = summary["stage1"], summary["stage2"]
    assert stage1["candidates"] == 200 and stage1["chance"] == 0.5
    assert stage1["text_recall@1"] >= 60
    assert stage1["image_recall@1"] >= 55
    assert stage2["vqa_accuracy"] >= 70
    assert stage2["vqa_accuracy"] - max(stage2["vqa_blind"], stage2["vqa_shuffled"]) >= 35
    assert stage2["caption_cider"] >= 4.0
    assert stage2["caption_cider"] - stage2["caption_cider_shuffled"] >= 1.0
    assert summary["out_of_domain"]["stage2"]["vqa_accuracy"] >= 68


def test_stage1_fits_real_photographs_from_the_command_line(shared_data: Path, tmp_path: Path) -> None:
    """152 photographs with 760 human captions, in sample: the machinery can tell them apart, both ways."""
    command_line("data", "pack", f"input={shared_data / 'photos'}", "out=data/photos", cwd=tmp_path)
    tokenizer = f"tokenizer.path={shared_data / 'tokenizers' / 'bert'}"
    command_line("train", "experiment=photos_stage1", tokenizer, "run_dir=run", cwd=tmp_path)
    command_line("evaluate", "run=run", cwd=tmp_path)
    command_line("report", "run=run", cwd=tmp_path)
    metrics, _ = RunDir(tmp_path / "run").read_eval("photos_retrieval")
    assert metrics["candidates"] == 152
    assert metrics["text_recall@1"] > 90 and metrics["image_recall@1"] > 90
    assert (tmp_path / "run" / "report.html").is_file()
