"""One gradient norm per optimizer step: the norm of everything, asked once, whatever happens to the gradients after."""

import math
from types import SimpleNamespace
from typing import Any

import torch

from blip2train.callback.gradient import total_norm


class FakeTrainer:
    def __init__(self, strategy: Any = None) -> None:
        self.global_step, self.strategy = 0, strategy or SimpleNamespace(root_device=torch.device("cpu"))


def optimizer_with(*gradients: list[float] | None) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient)
    return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)


def test_the_norm_is_over_all_groups_and_a_missing_gradient_counts_as_none() -> None:
    assert float(total_norm(FakeTrainer(), optimizer_with([3.0, 0.0], None, [0.0, 4.0]))) == 5.0


def test_without_any_gradient_the_norm_is_zero() -> None:
    assert float(total_norm(FakeTrainer(), optimizer_with(None, None))) == 0.0


def test_a_nan_anywhere_shows() -> None:
    assert math.isnan(float(total_norm(FakeTrainer(), optimizer_with([3.0, 0.0], [math.nan, 0.0]))))


def test_the_value_of_a_step_stays_after_clipping_and_the_next_step_has_its_own() -> None:
    trainer, optimizer = FakeTrainer(), optimizer_with([3.0, 4.0], [0.0, 0.0])
    first = total_norm(trainer, optimizer)
    optimizer.param_groups[0]["params"][0].grad.mul_(0.1)
    assert total_norm(trainer, optimizer) is first
    trainer.global_step = 1
    assert float(total_norm(trainer, optimizer)) == 0.5


def test_two_trainers_do_not_share_a_norm() -> None:
    assert float(total_norm(FakeTrainer(), optimizer_with([3.0, 4.0]))) == 5.0
    assert float(total_norm(FakeTrainer(), optimizer_with([6.0, 8.0]))) == 10.0


def test_a_strategy_that_hides_its_gradients_is_asked() -> None:
    strategy = SimpleNamespace(gradient_norm=lambda: torch.tensor(7.0))
    assert float(total_norm(FakeTrainer(strategy), optimizer_with([3.0, 4.0]))) == 7.0
