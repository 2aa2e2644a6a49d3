import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from blip2train.batch import IGNORE_INDEX
from blip2train.objective.language_modeling import LanguageModelingObjective, count_correct, next_token_loss


@dataclass
class Output:
    logits: Tensor
    targets: Tensor


def _example(dtype: torch.dtype = torch.float64) -> Output:
    generator = torch.Generator().manual_seed(0)
    targets_BT = torch.tensor([[1, 4, IGNORE_INDEX], [0, IGNORE_INDEX, 2]])
    return Output(torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).to(dtype), targets_BT)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_a_naive_loop_over_counted_tokens(smoothing: float) -> None:
    example = _example()
    losses = []
    for logits, target in zip(example.logits.flatten(0, 1).tolist(), example.targets.flatten().tolist(), strict=True):
        if target == IGNORE_INDEX:
            continue
        log_total = math.log(sum(math.exp(value) for value in logits))
        share = [(1 - smoothing) * (token == target) + smoothing / 5 for token in range(5)]
        losses.append(-sum(weight * (value - log_total) for weight, value in zip(share, logits, strict=True)))
    loss = next_token_loss(example.logits, example.targets, smoothing)
    assert abs(float(loss) - sum(losses)) < 1e-12


def test_without_smoothing_it_is_the_loss_of_transformers() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    example = _example(torch.float32)
    expected = ForCausalLMLoss(
        example.logits, labels=None, vocab_size=5, shift_labels=example.targets, ignore_index=IGNORE_INDEX
    )
    torch.testing.assert_close(LanguageModelingObjective()(example).loss, expected)


def test_half_precision_logits_are_summed_in_float32_also_under_autocast() -> None:
    example = _example(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = next_token_loss(example.logits, example.targets)
    exact = next_token_loss(example.logits.double(), example.targets)
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(exact)) < 1e-6


def test_no_counted_token_gives_zero_and_a_zero_gradient() -> None:
    logits_BTV = torch.randn(2, 3, 5, requires_grad=True)
    loss = LanguageModelingObjective()(Output(logits_BTV, torch.full((2, 3), IGNORE_INDEX))).loss
    loss.backward()
    assert float(loss) == 0.0
    assert not logits_BTV.grad.any()


def test_only_predicted_tokens_count_as_correct() -> None:
    targets_BT = torch.tensor([[1, 0, IGNORE_INDEX]])
    logits_BTV = torch.nn.functional.one_hot(torch.tensor([[1, 1, 1]]), 3).float()
    assert int(count_correct(logits_BTV, targets_BT)) == 1
    assert float(LanguageModelingObjective()(Output(logits_BTV, targets_BT)).metrics["lm_token_accuracy"]) == 0.5


def test_batch_of_one_runs() -> None:
    output = LanguageModelingObjective()(Output(torch.zeros(1, 1, 5), torch.tensor([[2]])))
    assert abs(float(output.loss) - math.log(5)) < 1e-6
