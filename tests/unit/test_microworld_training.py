"""The loop: interrupted and continued gives what one run gives, and another plan is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blip2train.errors import CheckpointError
from blip2train.microworld.training import Plan, train

PLAN = Plan(steps=12, batch_size=4, lr=0.05, warmup_steps=3, save_every_steps=5)


def _model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def _loss(model: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
    difference: Tensor = model(inputs) - inputs.sum(dim=1, keepdim=True)
    return difference.square().mean()


def test_an_interrupted_run_continues_to_the_same_weights(tmp_path: Path) -> None:
    whole, parts = _model(), _model()
    train(whole, lambda step: _loss(whole, step), PLAN, tmp_path / "whole.state")

    def stop_at_eight(done: int, _total: int, _loss: float) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parts, lambda step: _loss(parts, step), PLAN, tmp_path / "parts.state", stop_at_eight)
    fresh, seen = _model(), []
    train(fresh, lambda step: _loss(fresh, step), PLAN, tmp_path / "parts.state", lambda done, *_: seen.append(done))
    assert seen[0] == 6 and seen[-1] == 12
    assert torch.equal(fresh.weight, whole.weight) and torch.equal(fresh.bias, whole.bias)


def test_a_state_of_another_plan_is_refused(tmp_path: Path) -> None:
    model = _model()
    train(model, lambda step: _loss(model, step), PLAN, tmp_path / "x.state")
    with pytest.raises(CheckpointError, match="another plan"):
        train(model, lambda step: _loss(model, step), replace(PLAN, lr=0.1), tmp_path / "x.state")


def test_the_loss_falls_and_the_module_ends_in_evaluation_mode(tmp_path: Path) -> None:
    model, losses = _model(), []
    train(
        model,
        lambda step: _loss(model, step),
        replace(PLAN, steps=100),
        tmp_path / "y.state",
        lambda _done, _total, loss: losses.append(loss),
    )
    assert losses[-1] < 0.05 * losses[0]
    assert not model.training


def test_fast_parameters_move_ten_times_as_far_in_the_first_step(tmp_path: Path) -> None:
    moved = []
    for index, fast in enumerate(([], ["bias"])):
        model = _model()
        before = model.bias.detach().clone()
        chosen = [parameter for name, parameter in model.named_parameters() if name in fast]
        plan = replace(PLAN, steps=2, warmup_steps=1, weight_decay=0.0, lr=0.001)
        train(model, lambda step, model=model: _loss(model, step), plan, tmp_path / f"{index}.state", None, chosen)
        moved.append(float((model.bias - before).abs().sum()))
    assert moved[1] == pytest.approx(10 * moved[0], rel=0.05)
