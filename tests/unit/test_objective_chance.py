import math

import pytest
import torch

from blip2train.errors import ConfigError
from blip2train.objective.chance import chance_level
from blip2train.objective.contrastive import contrastive_loss
from blip2train.objective.language_modeling import next_token_loss


def test_itc_chance_is_the_loss_of_equal_similarities_with_and_without_smoothing() -> None:
    for smoothing in (0.0, 0.1):
        loss = contrastive_loss(torch.zeros(6, 6, dtype=torch.float64), torch.eye(6, dtype=torch.bool), smoothing)
        assert abs(chance_level("itc", batch_size=6) - float(loss)) < 1e-12


def test_itm_chance_is_the_best_constant_answer_to_one_in_three() -> None:
    def loss(positive: float) -> float:
        return -math.log(positive) / 3 - 2 * math.log(1 - positive) / 3

    best = min(loss(step / 10_000) for step in range(1, 10_000))
    assert abs(chance_level("itm") - best) < 1e-6
    assert round(chance_level("itm"), 4) == 0.6365


@pytest.mark.parametrize("objective", ["itg", "lm"])
def test_generation_chance_is_the_loss_of_equal_logits(objective: str) -> None:
    loss = next_token_loss(torch.zeros(2, 3, 17, dtype=torch.float64), torch.ones(2, 3, dtype=torch.int64), 0.1) / 6
    assert abs(chance_level(objective, vocab_size=17) - float(loss)) < 1e-12


@pytest.mark.parametrize("objective", ["itc", "itg", "lm", "typo"])
def test_missing_size_or_unknown_name_is_an_error(objective: str) -> None:
    with pytest.raises(ConfigError):
        chance_level(objective)
