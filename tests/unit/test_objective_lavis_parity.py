"""Losses, gradients and one update against unmodified LAVIS on the same weights (tests/lavis_comparison.py).

The likeliest stands for the draw, as in the recordings; LAVIS's one-sided contrastive gradient is switched on.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from torch import nn

from blip2train.batch import Stage1Batch
from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.model.qformer.mask import bidirectional, multimodal_causal


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


@pytest.mark.parametrize(("queries", "pairs"), [(1, 5), (3, 1), (1, 1)])
def test_one_query_or_one_pair_where_lavis_itself_fails(queries: int, pairs: int) -> None:
    """LAVIS squeezes away a dimension of 1 (test_lavis_oracle.py shows it). Ours give the losses of plain sums."""
    run = load_run(RECORDINGS, "stage1_short_texts")
    model = build_stage1(run)
    model.qformer.num_queries = queries
    model.qformer.query_tokens = nn.Parameter(model.qformer.query_tokens[:, :queries].detach())
    batch = stage1_batch(run)
    given = {item.name: getattr(batch, item.name) for item in fields(batch)}
    few = replace(batch, **{name: value[:pairs] for name, value in given.items() if value is not None})
    step = stage1_step(model, few, run.facts["bos"])
    assert step["losses"] == pytest.approx(_plain_losses(model, few, run.facts["bos"], step["negatives"]), rel=1e-10)
    assert all(gradient is None or gradient.isfinite().all() for gradient in step["gradients"].values())


@torch.no_grad()
def _plain_losses(model: Blip2Stage1, batch: Stage1Batch, dec_id: int, negatives: list[list[int]]) -> dict[str, float]:
    """Loops over pairs and queries; the passes through `joint`, the specification of the verbs."""
    ids, mask, pairs = batch.input_ids, batch.attention_mask, range(len(batch))
    image, queries = model.image_tokens(batch.pixel_values), model.qformer.num_queries
    features, texts = model.image_features(model.encode_image(image).hidden), model.text_features(ids, mask)
    rows = [[max(query @ text for query in features[i]) / model.temperature for text in texts] for i in pairs]
    similarity = torch.tensor(rows, dtype=torch.float64)
    own = torch.arange(len(batch))
    itc = sum(F.cross_entropy(table, own, label_smoothing=0.1) for table in (similarity, similarity.T)) / 2
    matched = [(i, i, 1) for i in pairs]
    matched += [(taken, i, 0) for i, taken in enumerate(negatives[0]) if taken >= 0]
    matched += [(i, taken, 0) for i, taken in enumerate(negatives[1]) if taken >= 0]
    itm = 0.0
    for picture, text, label in matched:
        allowed = bidirectional(queries, mask[text : text + 1])
        states = model.qformer.joint(image[picture : picture + 1], ids[text : text + 1], mask[text : text + 1], allowed)
        logits = model.itm_head(states[:, :queries]).mean(dim=1)
        itm += float(F.cross_entropy(logits, torch.tensor([label]))) / len(matched)
    start = torch.cat([torch.full_like(ids[:, :1], dec_id), ids[:, 1:]], dim=1)
    states = model.qformer.joint(image, start, mask, multimodal_causal(queries, mask))[:, queries:]
    words = model.qformer.lm_logits(states)[:, :-1][mask[:, 1:]]
    itg = F.cross_entropy(words, ids[:, 1:][mask[:, 1:]], label_smoothing=0.1)
    return {"itc": float(itc), "itm": itm, "itg": float(itg)}
