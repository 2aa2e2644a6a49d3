import math
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from blip2train.optim.schedule import epoch_staircase, warmup_cosine

PAPER = partial(warmup_cosine, warmup_steps=2000, max_steps=250_000, start_factor=0.01, final_factor=0.1)


def _formula(update: int, warmup: int, total: int, start: float, final: float) -> float:
    """The schedule as two textbook lines over the number of the update, counted from 1."""
    if update <= warmup:
        return start + (1 - start) * update / warmup
    return final + (1 - final) * (1 + math.cos(math.pi * (update - warmup) / (total - warmup))) / 2


def test_every_update_follows_the_formula() -> None:
    for step in [*range(2100), *range(2100, 250_000, 997), 249_999]:
        assert abs(PAPER(step) - _formula(step + 1, 2000, 250_000, 0.01, 0.1)) < 1e-15


def test_the_peak_and_the_minimum_are_met_exactly() -> None:
    assert PAPER(1999) == 1.0
    assert PAPER(249_999) == 0.1
    assert PAPER(249_998) > 0.1
    assert PAPER(250_000) == PAPER(10**9) == 0.1


def test_no_update_is_wasted_at_rate_zero() -> None:
    assert warmup_cosine(0, warmup_steps=4, max_steps=10) == 0.25


def test_it_rises_then_falls() -> None:
    factors = [warmup_cosine(step, warmup_steps=5, max_steps=20, final_factor=0.1) for step in range(20)]
    assert factors[:5] == sorted(factors[:5])
    assert factors[4:] == sorted(factors[4:], reverse=True)


@pytest.mark.parametrize("warmup", [0, 1, 9])
def test_short_and_missing_warm_ups_end_at_the_minimum(warmup: int) -> None:
    factors = [warmup_cosine(step, warmup_steps=warmup, max_steps=10, final_factor=0.2) for step in range(10)]
    assert factors[-1] == 0.2
    assert max(factors) <= 1.0


def test_torchs_scheduler_gives_update_i_the_factor_of_step_i() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = LambdaLR(optimizer, partial(warmup_cosine, warmup_steps=3, max_steps=8, final_factor=0.5))
    used = []
    for _ in range(8):
        parameter.grad = torch.ones(1)
        before = float(parameter.detach())
        optimizer.step()
        used.append(before - float(parameter.detach()))
        scheduler.step()
    expected = [2.0 * _formula(update, 3, 8, 0.0, 0.5) for update in range(1, 9)]
    assert used == pytest.approx(expected, abs=1e-6)
    assert used[-1] == pytest.approx(1.0, abs=1e-6)


def _lavis_rates(steps_per_epoch: int, num_epochs: int, warmup: int, start: float, peak: float, final: float) -> list:
    """LAVIS's rule as its training loop runs it: epochs outside, a rate set anew before each update."""
    rates = []
    for epoch in range(num_epochs):
        for iteration in range(steps_per_epoch):
            if epoch == 0:
                rate = min(peak, start + (peak - start) * iteration / warmup)
            else:
                rate = (peak - final) * (1 + math.cos(math.pi * epoch / num_epochs)) / 2 + final
            rates.append(rate)
    return rates


@pytest.mark.parametrize(("steps_per_epoch", "warmup"), [(867, 5000), (1355, 2000), (4498, 2000), (30, 7)])
def test_the_staircase_is_the_rule_of_lavis_at_every_update(steps_per_epoch: int, warmup: int) -> None:
    expected = _lavis_rates(steps_per_epoch, 10, warmup, 1e-6, 1e-4, 1e-5)
    found = [
        1e-4
        * epoch_staircase(
            step, warmup_steps=warmup, steps_per_epoch=steps_per_epoch, num_epochs=10, start_factor=0.01,
            final_factor=0.1,
        )
        for step in range(10 * steps_per_epoch)
    ]  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_staircase_at_its_epoch_borders() -> None:
    """Worked by hand for LAVIS's stage 1: 10 epochs of 867, warm-up 5000 from 0.01, minimum 0.1 of the peak."""
    rule = partial(
        epoch_staircase, warmup_steps=5000, steps_per_epoch=867, num_epochs=10, start_factor=0.01, final_factor=0.1
    )
    assert rule(0) == 0.01
    assert rule(866) == pytest.approx(0.01 + 0.99 * 866 / 5000)  # 0.18: the warm-up never ends
    assert rule(867) == rule(1733) == pytest.approx(0.1 + 0.45 * (1 + 0.9510565162951535))  # cos(18 degrees)
    assert rule(5 * 867) == pytest.approx(0.55)  # half-way
    assert rule(8669) == pytest.approx(0.1 + 0.45 * (1 - 0.9510565162951535))  # 0.122: the minimum is not reached
    assert rule(8670) == rule(10**9) == pytest.approx(0.1)  # after the run


def test_the_staircase_is_flat_between_warm_up_and_second_epoch() -> None:
    rule = partial(epoch_staircase, warmup_steps=4, steps_per_epoch=10, num_epochs=3)
    assert [rule(step) for step in range(10)] == [0.0, 0.25, 0.5, 0.75, *[1.0] * 6]
    assert epoch_staircase(0, warmup_steps=0, steps_per_epoch=1, num_epochs=1, start_factor=0.5) == 0.5
