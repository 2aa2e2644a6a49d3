"""One step of ours beside a recorded step of LAVIS: hidden states, losses, gradients, scores, an update.

Recordings and models come from tests/lavis_parity.py. Recordings in float32 are held to 1e-5, those in float64 to
1e-12; where a number is looser, its function says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis_parity import LavisRun, build_stage1, build_stage2, load_run, stage1_batch, stage2_batch
from torch import Tensor, nn
from two_ranks import on_two_ranks

from blip2train.batch import Stage1Batch
from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.qformer.mask import bidirectional, multimodal_causal
from blip2train.objective import matching
from blip2train.objective.context import build_context
from blip2train.objective.contrastive import ContrastiveObjective
from blip2train.objective.grounded_generation import GroundedGenerationObjective
from blip2train.objective.language_modeling import LanguageModelingObjective
from blip2train.objective.matching import NO_NEGATIVE, MatchingObjective
from blip2train.objective.similarity import query_text_similarity
from blip2train.optim.adamw import build_adamw

LOSSES = {"itc": "loss_itc", "itm": "loss_itm", "itg": "loss_lm"}
"""Our names of the stage-1 losses -> LAVIS's."""
NEGATIVES = ("neg_image_for_text", "neg_text_for_image")


def stage1_step(
    model: Blip2Stage1, batch: Stage1Batch, dec_id: int, negatives: list[list[int]] | None = None
) -> dict[str, Any]:
    """One training step with LAVIS's one-sided contrastive gradient and each rank's own means.

    Args:
        model: its gradients are set.
        batch: of this rank.
        dec_id: id of [DEC].
        negatives: image for each text and text for each image, to be taken; None takes the likeliest, as a recording.

    Returns:
        `losses` by our names, `negatives` as taken, `behind`: how far the worst of them is behind the likeliest one in
        its row's logits, `gradients`.
    """
    taken: list[list[int]] = []
    behind: list[float] = []

    def chosen(similarity: Tensor, forbidden: Tensor, _: Tensor) -> Tensor:
        allowed = similarity.detach().masked_fill(forbidden, -torch.inf)
        best = torch.where(forbidden.all(dim=1), NO_NEGATIVE, allowed.argmax(dim=1))
        own = best if negatives is None else torch.tensor(negatives[len(taken)])
        taken.append(own.tolist())
        distance = allowed.amax(dim=1) - allowed.gather(1, own.clamp(min=0)[:, None])[:, 0]
        behind.append(float(distance.max()))
        return own

    context = build_context(model.train(), batch, gather_gradients=False, global_means=False)
    objectives = {
        "itc": ContrastiveObjective(),
        "itm": MatchingObjective(),
        "itg": GroundedGenerationObjective(dec_id=dec_id),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "sample_hard_negatives", chosen)
        losses = {name: objective(context).loss for name, objective in objectives.items()}
    torch.stack(list(losses.values())).sum().backward()
    return {
        "losses": {name: loss.item() for name, loss in losses.items()},
        "negatives": taken,
        "behind": max(behind),
        "gradients": trained_gradients(model),
    }


def stage2_step(model: Blip2Stage2, run: LavisRun) -> tuple[float, dict[str, Tensor]]:
    """Loss of stage 2 and the gradients of what it trains."""
    loss = LanguageModelingObjective()(model.train()(stage2_batch(run))).loss
    loss.backward()
    return loss.item(), trained_gradients(model)


def trained_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: item.grad for name, item in model.named_parameters() if item.requires_grad}


def assert_close_to(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], relative: float, each: float | None = None
) -> None:
    """Same names; all tensors together within `relative` in the Euclidean norm, each within `each` in the maximum norm.

    `each` counts from the tensor's largest entry, or from a hundredth of the largest of all: some gradients are zero
    but for rounding (a key's bias moves no softmax). It is `relative` where not given. In float32, sums that cancel
    keep few digits: LAVIS's own gradient of the temperature is 2e-4 off its value in float64.
    """
    assert set(ours) == set(theirs)
    apart = {name: (ours[name] - expected).double() for name, expected in theirs.items()}
    overall = _norm(apart.values()) / _norm(theirs.values())
    assert overall <= relative, f"together they are off by {overall}"
    largest = max(float(tensor.abs().max()) for tensor in theirs.values())
    for name, expected in theirs.items():
        scale = max(float(expected.abs().max()), 0.01 * largest)
        worst = float(apart[name].abs().max()) / scale
        assert worst <= (relative if each is None else each), f"{name} is off by {worst} of its scale"


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


@torch.no_grad()
def assert_hidden_states(model: Blip2Stage1, run: LavisRun) -> None:
    """Image tokens and every row of the four passes, padded rows included; by the verbs and by their specification."""
    tensors, qformer = run.tensors, model.eval().qformer
    ids, mask = tensors["input_ids"], tensors["attention_mask"].bool()
    image = model.image_tokens(tensors["image"])
    query = model.encode_image(image)
    start = ids.clone()
    start[:, 0] = run.facts["bos"]
    own = torch.arange(len(ids))
    drawn_images, drawn_texts = (torch.tensor(run.facts[name]) for name in NEGATIVES)
    images, texts = torch.cat([own, drawn_images, own]), torch.cat([own, own, drawn_texts])
    matched = qformer.joint(image[images], ids[texts], mask[texts], bidirectional(qformer.num_queries, mask[texts]))
    told = qformer.joint(image, start, mask, multimodal_causal(qformer.num_queries, mask))
    ours = {
        "image": image,
        "query": query.hidden,
        "text": qformer.encode_text(ids, mask),
        "itm": matched,
        "itg": qformer.decode(start, mask, query),
    }
    relative = run.tolerance(single=1e-5, double=1e-12)
    assert_close_to(ours, {name: tensors[f"hidden/{name}"] for name in ours}, relative)
    verbs = {"itm": qformer.fuse(query.image, ids[texts], mask[texts], images), "itg": told[:, qformer.num_queries :]}
    theirs = {"itm": tensors["hidden/itm"][:, : qformer.num_queries], "itg": tensors["hidden/itg"]}
    assert_close_to(verbs, theirs, relative)


def assert_stage1_step(model: Blip2Stage1, run: LavisRun) -> None:
    """Losses on LAVIS's own negatives, which are the likeliest of ours too, and the gradients of all parameters."""
    step = stage1_step(model, stage1_batch(run), run.facts["bos"], [run.facts[name] for name in NEGATIVES])
    for name, theirs in LOSSES.items():
        assert step["losses"][name] == pytest.approx(run.facts[theirs], rel=run.tolerance(1e-5, 1e-12))
    assert step["behind"] < run.tolerance(1e-4, 1e-10)
    assert_gradients(step["gradients"], run.ours("grads"), run)


def assert_stage2_step(run: LavisRun) -> None:
    """Loss and gradients; T5 computes its norms in float32 whatever the weights are, and LAVIS's its softmax too."""
    float32_inside = run.facts["lm_config"]["model_type"] == "t5"
    loss, gradients = stage2_step(build_stage2(run), run)
    assert loss == pytest.approx(run.facts["loss"], rel=run.tolerance(1e-5, 1e-7 if float32_inside else 1e-12))
    assert_gradients(gradients, run.ours("grads"), run, float32_inside)


def assert_gradients(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], run: LavisRun, float32_inside: bool = False
) -> None:
    """To 1e-5 over all of them in float32, to 1e-12 in float64."""
    if float32_inside:
        assert_close_to(ours, theirs, 1e-5, each=1e-4)
    else:
        assert_close_to(ours, theirs, run.tolerance(1e-5, 1e-12), each=run.tolerance(2e-4, 1e-11))


def assert_match_scores(model: Blip2Stage1, run: LavisRun) -> None:
    """LAVIS's Blip2ITM on every image with its text: two-class logits and the contrastive score."""
    ids, mask = run.tensors["input_ids"], run.tensors["attention_mask"].bool()
    with torch.no_grad():
        image = model.eval().image_tokens(run.tensors["image"])
        logits = model.matching_logits(image, ids, mask)
        queries = model.image_features(model.encode_image(image).hidden)
        scores = query_text_similarity(queries, model.text_features(ids, mask)).diagonal()[:, None]
    ours = {"itm": logits, "itc": scores}
    assert_close_to(ours, {head: run.tensors[f"match/{head}"] for head in ours}, 1e-5)


def assert_after_update(model: Blip2Stage1 | Blip2Stage2, run: LavisRun, temperature_decays: bool) -> None:
    """LAVIS's gradients through our AdamW: the rate is 1e-4, where Adam's first step is rate * sign.

    Args:
        model: gets LAVIS's gradients and one update.
        run: with `after_adamw/`.
        temperature_decays: as at LAVIS's HEAD, which decays what has not one dimension, and so does ours; 1.0.2 decays
            what has two or more.
    """
    rate, decay = 1e-4, 0.05
    optimizer, _ = build_adamw(
        model,
        lr=rate,
        weight_decay=decay,
        warmup_steps=0,
        max_steps=10**9,
        min_lr=0.0,
        no_decay="lavis",
        betas=(0.9, 0.999),
    )
    gradients, expected = run.ours("grads"), run.ours("after_adamw")
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name)
    if not temperature_decays and "temperature" in expected:
        expected["temperature"] = expected["temperature"] - rate * decay * run.ours("state_dict")["temperature"]
    optimizer.step()
    updated = dict(model.named_parameters())
    for name, theirs in expected.items():
        torch.testing.assert_close(
            updated[name].detach(), theirs, rtol=run.tolerance(1e-7, 1e-14), atol=run.tolerance(2e-8, 1e-14), msg=name
        )


def assert_two_ranks(folder: Path, name: str, scratch: Path) -> None:
    """Each rank's losses and negatives, and the mean of their gradients, as DistributedDataParallel makes it."""
    run = load_run(folder, name)
    ranks = on_two_ranks(_rank_step, scratch, folder, name)
    for number, step in enumerate(ranks):
        own = run.rank(number)
        for ours, theirs in LOSSES.items():
            assert step["losses"][ours] == pytest.approx(own.facts[theirs], rel=run.tolerance(1e-5, 1e-12))
        assert step["negatives"] == [own.facts[name] for name in NEGATIVES]
    averaged = {key: (ranks[0]["gradients"][key] + ranks[1]["gradients"][key]) / 2 for key in ranks[0]["gradients"]}
    assert_gradients(averaged, run.ours("grads_ddp_mean"), run)


def _rank_step(rank: int, folder: Path, name: str) -> dict[str, Any]:
    run = load_run(folder, name).rank(rank)
    batch = stage1_batch(run, first_image=rank * len(run.tensors["image"]))
    return stage1_step(build_stage1(run), batch, run.facts["bos"])
