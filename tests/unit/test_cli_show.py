"""The microscope looks at any experiment as it is, without what only a training needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig

from blip2train.cli.config import compose
from blip2train.cli.show_estimate import show_estimate, steps_and_time
from blip2train.cli.show_params import show_params
from blip2train.errors import ConfigError


def params(*overrides: str) -> DictConfig:
    return compose("show_params", ["experiment=microworld_stage2_opt", "run_dir=outputs/x", *overrides])


def estimate(*overrides: str, experiment: str = "microworld_stage2_opt") -> DictConfig:
    return compose("show_estimate", [f"experiment={experiment}", "run_dir=outputs/x", *overrides])


def test_params_of_stage_two_need_no_stage_one_weights(capsys: pytest.CaptureFixture[str]) -> None:
    show_params(params())
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    frozen_column = rows["language_model"].split("│")[3].strip()
    assert int(frozen_column.replace(",", "")) > 400_000 and rows["language_model"].split("│")[2].strip() == "0"


def test_a_deeper_table_has_more_lines_and_the_same_sum(tmp_path: Path) -> None:
    tables = []
    for depth in (1, 3):
        show_params(params(f"depth={depth}", f"out={tmp_path / 'counts.json'}"))
        tables.append(json.loads((tmp_path / "counts.json").read_text(encoding="utf-8")))
    flat, deep = tables
    assert "qformer.blocks.0" in deep["modules"] and "qformer.blocks.0" not in flat["modules"]
    for kind in ("trainable", "frozen"):
        assert flat[kind] == deep[kind] == sum(module[kind] for module in deep["modules"].values())


def test_a_depth_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="depth is 0"):
        show_params(params("depth=0"))


def test_estimate_prints_its_sum_and_warns_where_the_device_is_too_small(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    show_estimate(estimate("device_gb=0.001", f"out={tmp_path / 'estimate.json'}"))
    printed = capsys.readouterr().out
    assert "warning" in printed and "checkpoint_activations" in printed and "language model" in printed
    assert "deepspeed" not in printed  # one device has nothing to share
    written = json.loads((tmp_path / "estimate.json").read_text(encoding="utf-8"))
    for moment in ("loss_known", "peak"):
        assert written["total"][moment] == sum(written["fixed"].values()) + sum(written[moment].values())
    show_estimate(estimate("device_gb=1000"))
    printed = capsys.readouterr().out
    assert "warning" not in printed and "fits into 1000 GiB" in printed


def test_a_device_that_would_be_full_to_the_brim_is_a_warning_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The note below the table asks for a tenth of the device."""
    show_estimate(estimate(f"out={tmp_path / 'estimate.json'}"))
    peak = json.loads((tmp_path / "estimate.json").read_text(encoding="utf-8"))["total"]["peak"] / 2**30
    show_estimate(estimate(f"device_gb={peak * 1.05}"))
    assert "less than a tenth free" in capsys.readouterr().out
    show_estimate(estimate(f"device_gb={peak * 1.15}"))
    assert "warning" not in capsys.readouterr().out


def test_time_of_the_papers_largest_run_at_its_rate() -> None:
    # 80,000 steps of 1520 at 469 samples/s: the paper's "less than 3 days", 0.94 epochs of 129M
    config = estimate("samples_per_second=469", "epoch_samples=129e6", experiment="paper/stage2_vitg_flan_t5_xxl")
    facts = steps_and_time(config)
    assert facts["global batch"] == 1520 and facts["samples seen"] == 121_600_000
    assert facts["hours"] == pytest.approx(72.02, abs=0.01) and facts["epochs"] == pytest.approx(0.943, abs=0.001)
    assert 1 / facts["steps per second"] == pytest.approx(3.24, abs=0.01)


@pytest.mark.parametrize("key", ["samples_per_second", "epoch_samples", "device_gb", "text_tokens"])
def test_a_size_that_is_not_above_zero_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is 0"):
        steps_and_time(estimate(f"{key}=0"))


@pytest.mark.parametrize(
    "override", ["samples_per_second=fast", "text_tokens=2.5", "device_gb=40GB", "epoch_samples=true"]
)
def test_a_size_that_is_no_number_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.replace("=", " is '?").replace("true", "True")):
        steps_and_time(estimate(override))


def test_a_folder_as_out_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blip2train.cli.show", "params", "experiment=microworld_stage1"]
    done = subprocess.run([*command, f"out={tmp_path}"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "is a folder" in done.stderr and "Traceback" not in done.stderr


def test_params_say_where_the_language_models_shape_is_from(caplog: pytest.LogCaptureFixture) -> None:
    """Another hub name keeps the counts of the yaml: the reader is told."""
    caplog.set_level("INFO", logger="blip2train")
    show_params(params("llm.path=facebook/opt-1.3b", "experiment=paper/stage2_vitg_opt_2_7b"))
    assert any("llm.architecture; facebook/opt-1.3b itself is not read" in message for message in caplog.messages)
