"""Losses, gradients and one update against what unmodified LAVIS computed on the same weights (tests/lavis_parity.py).

`hardest` stands for the draw, as in the recordings; LAVIS's one-sided contrastive gradient is switched on.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lavis_parity import LavisRun, build_stage1, build_stage2, load_run
from test_objective_two_ranks import hardest
from torch import Tensor
from two_ranks import on_two_ranks

from blip2train.batch import Stage1Batch, Stage2Batch
from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.objective import matching
from blip2train.objective.context import build_context
from blip2train.objective.contrastive import ContrastiveObjective
from blip2train.objective.grounded_generation import GroundedGenerationObjective
from blip2train.objective.language_modeling import LanguageModelingObjective
from blip2train.objective.matching import MatchingObjective
from blip2train.optim.adamw import build_adamw

LOSSES = {"itc": "loss_itc", "itm": "loss_itm", "itg": "loss_lm"}


def _batch(images: Tensor, ids: Tensor, mask: Tensor, first_image: int = 0) -> Stage1Batch:
    """LAVIS pads every text to 16; ours go to the longest, which must not matter."""
    longest = int(mask.sum(dim=1).max())
    return Stage1Batch(
        pixel_values=images,
        input_ids=ids[:, :longest],
        attention_mask=mask[:, :longest].bool(),
        image_ids=torch.arange(first_image, first_image + len(ids)),
        keys=[str(row) for row in range(len(ids))],
    )


def _step(model: Blip2Stage1, batch: Stage1Batch, dec_id: int) -> dict[str, Any]:
    """Losses by our names, the negatives taken (image for each text, text for each image), gradients on the model."""
    negatives: list[list[int]] = []

    def recorded(similarity: Tensor, forbidden: Tensor, generator: object) -> Tensor:
        negatives.append(hardest(similarity, forbidden).tolist())
        return torch.tensor(negatives[-1])

    context = build_context(model.train(), batch, gather_gradients=False)
    objectives = {
        "itc": ContrastiveObjective(),
        "itm": MatchingObjective(),
        "itg": GroundedGenerationObjective(dec_id=dec_id),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "sample_hard_negatives", recorded)
        losses = {name: objective(context).loss for name, objective in objectives.items()}
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: item.grad for name, item in model.named_parameters() if item.requires_grad}
    return {
        "losses": {name: loss.item() for name, loss in losses.items()},
        "negatives": negatives,
        "gradients": gradients,
    }


def _assert_gradients(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(gradients) == set(expected)
    for name, theirs in expected.items():
        worst = float((gradients[name] - theirs).abs().max())
        assert worst <= 1e-3 * float(theirs.abs().max()) + 1e-7, f"{name} is off by {worst}"


@pytest.fixture(scope="module")
def six(shared_data: Path) -> LavisRun:
    return load_run(shared_data, "stage1_six_captions")


@pytest.fixture(scope="module")
def six_step(six: LavisRun) -> tuple[Blip2Stage1, dict[str, Any]]:
    model = build_stage1(six)
    batch = _batch(six.tensors["image"], six.tensors["input_ids"], six.tensors["attention_mask"])
    return model, _step(model, batch, six.facts["bos"])


def test_stage1_losses_and_negatives(six: LavisRun, six_step: tuple[Blip2Stage1, dict[str, Any]]) -> None:
    step = six_step[1]
    for name, theirs in LOSSES.items():
        assert step["losses"][name] == pytest.approx(six.facts[theirs], abs=1e-5)
    assert sum(step["losses"].values()) == pytest.approx(six.facts["loss"], abs=1e-5)
    assert step["negatives"] == [six.facts["neg_image_for_text"], six.facts["neg_text_for_image"]]


def test_stage1_gradients_of_every_parameter(six: LavisRun, six_step: tuple[Blip2Stage1, dict[str, Any]]) -> None:
    _assert_gradients(six_step[1]["gradients"], six.ours("grads"))


def test_stage1_parameters_after_one_update(six: LavisRun) -> None:
    """LAVIS's gradients through our AdamW: the recording's rate is 1e-4, where Adam's first step is rate * sign."""
    model = build_stage1(six)
    optimizer, _ = build_adamw(
        model, lr=1e-4, warmup_steps=0, max_steps=10**9, min_lr=0.0, no_decay="lavis", betas=(0.9, 0.999)
    )
    for name, parameter in model.named_parameters():
        parameter.grad = six.ours("grads").get(name)
    optimizer.step()
    updated = dict(model.named_parameters())
    for name, theirs in six.ours("after_adamw").items():
        torch.testing.assert_close(updated[name].detach(), theirs, rtol=0, atol=2e-8, msg=lambda m, n=name: f"{n}: {m}")


def _rank_step(rank: int, shared_data: Path) -> dict[str, Any]:
    run = load_run(shared_data, "stage1_two_ranks")
    own = {key: run.tensors[f"ranks{rank}/{key}"] for key in ("image", "input_ids", "attention_mask")}
    return _step(build_stage1(run), _batch(*own.values(), first_image=4 * rank), run.facts["bos"])


def test_stage1_on_two_ranks(shared_data: Path, tmp_path: Path) -> None:
    run = load_run(shared_data, "stage1_two_ranks")
    ranks = on_two_ranks(_rank_step, tmp_path, shared_data)
    for number, step in enumerate(ranks):
        for name, theirs in LOSSES.items():
            assert step["losses"][name] == pytest.approx(run.facts[f"ranks{number}/{theirs}"], abs=1e-5)
        assert step["negatives"] == [
            run.facts[f"ranks{number}/neg_image_for_text"],
            run.facts[f"ranks{number}/neg_text_for_image"],
        ]
    averaged = {name: (ranks[0]["gradients"][name] + ranks[1]["gradients"][name]) / 2 for name in ranks[0]["gradients"]}
    _assert_gradients(averaged, run.ours("grads_ddp_mean"))


def test_stage2_loss_and_gradients(shared_data: Path) -> None:
    run = load_run(shared_data, "stage2_opt")
    model = build_stage2(run).train()
    ids, mask = run.tensors["text/input_ids"], run.tensors["text/attention_mask"].bool()
    nothing = ids.new_zeros(len(ids), 0)
    keys = [str(row) for row in range(len(ids))]
    batch = Stage2Batch(run.tensors["image"], nothing, nothing.bool(), ids, mask, keys)
    loss = LanguageModelingObjective()(model(batch)).loss
    loss.backward()
    assert loss.item() == pytest.approx(run.facts["loss"], abs=1e-5)
    gradients = {name: item.grad for name, item in model.named_parameters() if item.requires_grad}
    _assert_gradients(gradients, run.ours("grads"))
