"""What a step draws depends on the seed, the batch and the rank alone, not on what was drawn before."""

import random

import numpy as np
import pytest
import torch

from blip2train.stage.common import seed_batch


def draws() -> tuple[float, float, float]:
    """One number of each generator that a step can draw from."""
    return float(torch.rand(1)), random.random(), float(np.random.rand())


def test_a_resumed_step_draws_what_it_drew_before() -> None:
    seed_batch(3, 7, 0)
    first = draws()
    draws()
    seed_batch(3, 7, 0)
    assert draws() == first


@pytest.mark.parametrize("other", [(4, 7, 0), (3, 8, 0), (3, 7, 1), (3, 10**12, 0)])
def test_another_seed_batch_or_rank_draws_something_else(other: tuple[int, int, int]) -> None:
    seed_batch(3, 7, 0)
    first = draws()
    seed_batch(*other)
    assert all(now != before for now, before in zip(draws(), first, strict=True))
