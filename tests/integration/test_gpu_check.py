"""scripts/gpu_check.sh without a GPU: its dry run runs every command, and without --dry-run it fails loudly."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_fails_loudly_without_a_gpu() -> None:
    result = subprocess.run(["bash", "scripts/gpu_check.sh"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and "no CUDA device" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_dry_run_trains_and_resumes_both_stages(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = ["bash", "scripts/gpu_check.sh", "--dry-run", "--out", str(tmp_path / "out"), "--results", str(results)]
    subprocess.run(command, cwd=ROOT, check=True)
    facts = json.loads(results.read_text(encoding="utf-8"))
    assert len(facts["cases"]) == 4 and all(case["resumed"] for case in facts["cases"].values())
    assert facts["unproven"][0] == "everything on a GPU and at real sizes"
