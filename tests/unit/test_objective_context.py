"""What is computed when, and where gradients go, on one process."""

from collections import Counter

import pytest
import torch
from fake_stage1 import DEC_ID, FakeStage1, fake_batch, fake_model

from blip2train import distributed
from blip2train.objective.context import MIN_TEMPERATURE, Objective, build_context
from blip2train.objective.contrastive import ContrastiveObjective
from blip2train.objective.grounded_generation import GroundedGenerationObjective
from blip2train.objective.matching import MatchingObjective

ITC, ITM, ITG = ContrastiveObjective(), MatchingObjective(), GroundedGenerationObjective(dec_id=DEC_ID)
EVEN_ITM = MatchingObjective(hard_share=0.0)


def _calls(*objectives: Objective) -> Counter[str]:
    model = fake_model()
    context = build_context(model, fake_batch(4), gather_gradients=True)
    for objective in objectives:
        objective(context)
    return model.calls


def test_building_a_context_runs_nothing() -> None:
    assert not _calls()


@pytest.mark.parametrize(
    ("objectives", "passes"),
    [
        ([ITG], {"encode_image", "generation_logits"}),
        ([ITC], {"encode_image", "image_features", "text_features"}),
        ([EVEN_ITM], {"matching_logits"}),
        ([ITM], {"encode_image", "image_features", "text_features", "matching_logits"}),
    ],
)
def test_only_the_passes_that_a_loss_needs_are_run(objectives: list[Objective], passes: set[str]) -> None:
    assert set(_calls(*objectives)) == passes | {"raw_tokens", "normalise_tokens", "image_keys_values"}


def test_all_losses_together_run_each_pass_once() -> None:
    assert set(_calls(ITC, ITM, ITG).values()) == {1}


def test_only_what_a_loss_needs_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[str] = []

    def spy(local: torch.Tensor, *, sizes: list[int], with_grad: bool, label: str) -> torch.Tensor:
        assert sizes == [len(local)]
        gathered.append(label)
        return local

    monkeypatch.setattr(distributed, "gather", spy)
    _calls(ITG)
    assert gathered == []
    _calls(ITC)
    assert sorted(gathered) == ["image features", "image ids", "text features"]
    _calls(EVEN_ITM)
    assert sorted(gathered[3:]) == ["image ids", "pair ids", "text"]


def test_the_order_of_the_losses_changes_no_gradient() -> None:
    gradients = []
    for order in ([ITC, ITM, ITG], [ITG, ITM, ITC]):
        model = fake_model()
        context = build_context(model, fake_batch(4))
        torch.stack([objective(context).loss for objective in order]).sum().backward()
        gradients.append({name: item.grad for name, item in model.named_parameters() if item.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-14)


def _similarities(gather_gradients: bool) -> tuple[FakeStage1, torch.Tensor, torch.Tensor]:
    model = fake_model()
    context = build_context(model, fake_batch(4), gather_gradients=gather_gradients)
    return model, context.similarity_i2t, context.similarity_t2i


def test_one_sided_gradients_train_only_the_asking_side_also_on_one_process() -> None:
    model, image_to_text, _ = _similarities(gather_gradients=False)
    image_to_text.square().sum().backward()
    assert model.words.weight.grad is None
    assert model.query_tokens.grad.abs().sum() > 0
    model, _, text_to_image = _similarities(gather_gradients=False)
    text_to_image.square().sum().backward()
    assert model.query_tokens.grad is None
    assert model.words.weight.grad.abs().sum() > 0


def test_two_sided_gradients_train_both_sides_in_each_direction() -> None:
    for direction in (1, 2):
        parts = _similarities(gather_gradients=True)
        parts[direction].square().sum().backward()
        assert parts[0].query_tokens.grad.abs().sum() > 0
        assert parts[0].words.weight.grad.abs().sum() > 0


def test_a_temperature_at_zero_or_below_cannot_make_the_loss_nan() -> None:
    for value in (0.0, -0.5):
        model = fake_model()
        with torch.no_grad():
            model.temperature.fill_(value)
        context = build_context(model, fake_batch(3), gather_gradients=True)
        assert float(context.temperature) == MIN_TEMPERATURE
        assert torch.isfinite(ITC(context).loss)


def test_similarities_are_divided_by_the_temperature() -> None:
    model, image_to_text, text_to_image = _similarities(gather_gradients=True)
    assert float(image_to_text.abs().max()) <= 1 / float(model.temperature)
    torch.testing.assert_close(image_to_text, text_to_image.T)
    assert image_to_text.abs().max() > 1
