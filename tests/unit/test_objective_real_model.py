"""The objectives on small real models: batch of one, empty text, precisions, and the reuse of the image pass."""

import pytest
import torch
from tiny_model import OPT, random_images, random_text, stage2_batch, tiny_stage1, tiny_stage2
from torch import Tensor

from blip2train.batch import Stage1Batch
from blip2train.model.language_model.decoder_only import DecoderOnly
from blip2train.objective.context import Objective, build_context
from blip2train.objective.contrastive import ContrastiveObjective
from blip2train.objective.grounded_generation import GroundedGenerationObjective
from blip2train.objective.language_modeling import LanguageModelingObjective
from blip2train.objective.matching import MatchingObjective

OBJECTIVES: dict[str, Objective] = {
    "itc": ContrastiveObjective(),
    "itm": MatchingObjective(),
    "itm_even": MatchingObjective(hard_share=0.0, same_text_matches=True),
    "itg": GroundedGenerationObjective(dec_id=4),
}


def _batch(lengths: list[int]) -> Stage1Batch:
    ids_BT, mask_BT = random_text(lengths)
    keys = [str(row) for row in range(len(lengths))]
    return Stage1Batch(random_images(len(lengths)), ids_BT, mask_BT, torch.arange(len(lengths)), keys)


def _losses(model: torch.nn.Module, batch: Stage1Batch, names: list[str]) -> dict[str, Tensor]:
    context = build_context(model, batch)  # type: ignore[arg-type]
    return {name: OBJECTIVES[name](context).loss for name in names}


@pytest.mark.parametrize("lengths", [[5], [1], [1, 1]])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_of_one_and_texts_of_one_token_train(name: str, lengths: list[int]) -> None:
    model = tiny_stage1().train()
    loss = _losses(model, _batch(lengths), [name])[name]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(item.grad).all() for item in model.parameters() if item.grad is not None)


def test_stage2_trains_on_a_batch_of_one() -> None:
    torch.manual_seed(0)
    model = tiny_stage2(DecoderOnly(OPT)).train()
    output = LanguageModelingObjective()(model(stage2_batch([0], [4])))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert model.projection.weight.grad.abs().sum() > 0


def test_losses_are_float32_under_bfloat16_autocast_and_close_to_the_float32_ones() -> None:
    model, batch = tiny_stage1().eval(), _batch([5, 7, 4, 6])
    names = ["itc", "itg"]
    exact = _losses(model, batch, names)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = _losses(model, batch, [*names, "itm"])
    for name in names:
        assert mixed[name].dtype == torch.float32
        assert abs(float(mixed[name]) - float(exact[name])) < 0.05
    assert mixed["itm"].dtype == torch.float32


def test_a_float64_model_keeps_float64_losses() -> None:
    losses = _losses(tiny_stage1().double().eval(), _batch([5, 7, 4]), ["itc", "itm", "itg"])
    assert {loss.dtype for loss in losses.values()} == {torch.float64}


def test_matching_gives_the_same_gradients_with_and_without_the_image_pass_of_another_loss() -> None:
    gradients = []
    for names in (["itm_even"], ["itg", "itm_even"]):
        model = tiny_stage1().double().eval()
        _losses(model, _batch([5, 7, 4, 6]), names)["itm_even"].backward()
        gradients.append({name: item.grad for name, item in model.named_parameters() if item.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-13)


def test_no_gradient_reaches_the_frozen_encoder() -> None:
    model = tiny_stage1().train()
    sum(_losses(model, _batch([5, 7, 4]), ["itc", "itm", "itg"]).values()).backward()
    assert all(item.grad is None for item in model.get_submodule("vision_encoder").parameters())
    untrained = [name for name, item in model.named_parameters() if item.requires_grad and item.grad is None]
    assert untrained == []
