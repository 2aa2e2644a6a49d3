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
    """Two buckets as in ZeRO-2, and the weights in use: all of a small model, 10^9 of a large one."""
    whole = 4 * TRAINED + 2 * FROZEN
    assert communication_bytes(model, Sharing(5, 3)) - communication_bytes(model, Sharing(5, 2)) == whole
    assert communication_bytes(model, Sharing(1, 3)) == communication_bytes(model, Sharing(1, 2)) == 2 * 50_000_000 * 4
    with torch.device("meta"):
        large = nn.Linear(50_000, 50_000, bias=False, dtype=torch.bfloat16)
    gathered = communication_bytes(large, Sharing(5, 3)) - communication_bytes(large, Sharing(5, 2))
    assert gathered == 2 * 1_000_000_000


def test_fsdp2_shards_all_and_gathers_the_root_and_two_blocks() -> None:
    model = nn.Module()
    model.vision_encoder = nn.Module()
    model.vision_encoder.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(5))
    model.head = nn.Linear(8, 2, bias=False)
    model.vision_encoder.requires_grad_(False)
    shared = Sharing(4, fsdp2=True)
    assert sum(weight_bytes(model, shared).values()) == 4 * (5 * 64 + 16) // 4
    assert optimizer_bytes(model, shared) == 2 * 4 * 16 // 4
    assert communication_bytes(model, shared) == 4 * (16 + 2 * 64) + 4 * 16
    assert communication_bytes(model, Sharing(1, fsdp2=True)) == 0


def test_an_offloaded_optimizer_takes_nothing_of_the_device(model: nn.Module) -> None:
    assert optimizer_bytes(model, Sharing(5, 2, offload=True)) == 0


@pytest.mark.parametrize(
    ("name", "weights", "autocast"),
    [
        ("32-true", None, None),
        ("bf16-mixed", None, torch.bfloat16),
        ("16", None, torch.float16),
        ("bf16-true", torch.bfloat16, None),
    ],
)
def test_precision(name: str, weights: torch.dtype | None, autocast: torch.dtype | None) -> None:
    precision = parse_precision(name)
    assert (precision.weights, precision.autocast) == (weights, autocast)


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ConfigError, match="transformer-engine"):
        parse_precision("transformer-engine")
