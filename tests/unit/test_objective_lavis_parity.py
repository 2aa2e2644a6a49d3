"""Losses, gradients and one update against unmodified LAVIS on the same weights (tests/lavis_comparison.py).

The likeliest stands for the draw, as in the recordings; LAVIS's one-sided contrastive gradient is switched on.
"""

from pathlib import Path
from typing import Any

import pytest
from lavis_comparison import (
    LOSSES,
    assert_after_update,
    assert_gradients,
    assert_stage1_step,
    assert_stage2_step,
    assert_two_ranks,
    stage1_step,
)
from lavis_parity import RECORDINGS, LavisRun, build_stage1, load_run, shared_run, stage1_batch


@pytest.fixture(scope="module")
def six(shared_data: Path) -> LavisRun:
    return shared_run(shared_data, "stage1_six_captions")


@pytest.fixture(scope="module")
def six_step(six: LavisRun) -> dict[str, Any]:
    return stage1_step(build_stage1(six), stage1_batch(six), six.facts["bos"])


def test_stage1_losses_and_negatives(six: LavisRun, six_step: dict[str, Any]) -> None:
    for name, theirs in LOSSES.items():
        assert six_step["losses"][name] == pytest.approx(six.facts[theirs], rel=1e-6)
    assert sum(six_step["losses"].values()) == pytest.approx(six.facts["loss"], rel=1e-6)
    assert six_step["negatives"] == [six.facts["neg_image_for_text"], six.facts["neg_text_for_image"]]


def test_stage1_gradients_of_every_parameter(six: LavisRun, six_step: dict[str, Any]) -> None:
    assert_gradients(six_step["gradients"], six.ours("grads"), six)


def test_stage1_parameters_after_one_update(six: LavisRun) -> None:
    assert_after_update(build_stage1(six), six, temperature_decays=True)


def test_stage1_on_two_ranks(shared_data: Path, tmp_path: Path) -> None:
    assert_two_ranks(shared_data / "lavis_numerics", "stage1_two_ranks", tmp_path)


def test_stage1_with_short_texts_and_equal_images_in_double_precision() -> None:
    """A cross-attention every third layer, temperature 0.4, three of five images equal."""
    run = load_run(RECORDINGS, "stage1_short_texts")
    assert (run.tensors["image"][:3] == run.tensors["image"][0]).all()
    assert_stage1_step(build_stage1(run), run)


def test_stage2_with_opt(shared_data: Path) -> None:
    assert_stage2_step(shared_run(shared_data, "stage2_opt"))


def test_stage2_with_opt_and_a_prompt_that_has_no_loss() -> None:
    run = load_run(RECORDINGS, "stage2_opt_prompt")
    assert int(run.tensors["prompt_length"]) > 5
    assert_stage2_step(run)


def test_stage2_with_t5_and_one_query() -> None:
    run = load_run(RECORDINGS, "stage2_t5")
    assert run.facts["args"]["queries"] == 1
    assert_stage2_step(run)
