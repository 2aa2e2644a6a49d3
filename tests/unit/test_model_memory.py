"""The arithmetic of weights, gradients and optimizer state, against sums done by hand."""

import pytest
import torch
from torch import nn

from blip2train.errors import ConfigError
from blip2train.model.memory import (
    Sharing,
    communication_bytes,
    gradient_bytes,
    optimizer_bytes,
    parse_precision,
    weight_bytes,
)

TRAINED, FROZEN = 10 * 10 + 10, 20 * 5 + 5


@pytest.fixture
def model() -> nn.Module:
    parts = nn.ModuleDict({"qformer": nn.Linear(10, 10), "vision_encoder": nn.Linear(20, 5).half()})
    parts["vision_encoder"].requires_grad_(False)
    return parts


def test_one_device_holds_a_gradient_and_two_moments_of_what_trains(model: nn.Module) -> None:
    alone = Sharing()
    expected = {"qformer float32": 4 * TRAINED, "vision_encoder float16": 2 * FROZEN, "buffers": 0}
    assert weight_bytes(model, alone) == expected
    assert gradient_bytes(model) == 4 * TRAINED
    assert optimizer_bytes(model, alone) == 8 * TRAINED
    assert communication_bytes(model, alone) == 0


def test_the_moments_are_those_that_adamw_makes(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad])
    for item in model["qformer"].parameters():
        item.grad = torch.ones_like(item)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert optimizer_bytes(model, Sharing()) == sum(item.numel() * item.element_size() for item in moments)


def test_ddp_copies_gradients_into_buckets_and_shards_nothing(model: nn.Module) -> None:
    assert communication_bytes(model, Sharing(8)) == 4 * TRAINED
    assert weight_bytes(model, Sharing(8)) == weight_bytes(model, Sharing())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_shards_optimizer_then_gradients_then_weights(model: nn.Module, stage: int) -> None:
    shared = Sharing(5, stage)
    assert optimizer_bytes(model, shared) == 12 * TRAINED // 5  # float32 copy and two moments
    assert shared.sharded(100, from_stage=2) == (100 if stage < 2 else 20)
    assert weight_bytes(model, shared)["vision_encoder float16"] == (2 * FROZEN if stage < 3 else 2 * FROZEN // 5)


def test_zero3_gathers_what_it_has_sharded_up_to_deepspeeds_limit(model: nn.Module) -> None:
    """Two buckets of 200M elements as in ZeRO-2, and the weights in use: all of a small model, 10^9 of a large one."""
    whole = 4 * TRAINED + 2 * FROZEN
    assert communication_bytes(model, Sharing(5, 3)) - communication_bytes(model, Sharing(5, 2)) == whole
    assert communication_bytes(model, Sharing(1, 3)) == communication_bytes(model, Sharing(1, 2)) == 2 * 200_000_000 * 4
    with torch.device("meta"):
        large = nn.Linear(50_000, 50_000, bias=False, dtype=torch.bfloat16)
    gathered = communication_bytes(large, Sharing(5, 3)) - communication_bytes(large, Sharing(5, 2))
    assert gathered == 2 * 1_000_000_000


@pytest.mark.parametrize(
    ("name", "deepspeed", "weights", "autocast"),
    [
        ("32-true", False, None, None),
        ("bf16-mixed", False, None, torch.bfloat16),
        ("16", False, None, torch.float16),
        ("bf16-true", False, torch.bfloat16, None),
        ("bf16-mixed", True, torch.bfloat16, None),
        ("32-true", True, None, None),
    ],
)
def test_precision(name: str, deepspeed: bool, weights: torch.dtype | None, autocast: torch.dtype | None) -> None:
    precision = parse_precision(name, deepspeed=deepspeed)
    assert (precision.weights, precision.autocast) == (weights, autocast)


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ConfigError, match="transformer-engine"):
        parse_precision("transformer-engine", deepspeed=False)
