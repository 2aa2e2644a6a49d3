"""Frozen weights that move and trainable ones that do not are named; nothing else is."""

import torch
from torch import nn

from blip2train.health.weight_watch import SAMPLE, WeightWatch


def model() -> nn.Module:
    torch.manual_seed(0)
    parts = nn.ModuleDict({"frozen": nn.Linear(50, 40), "trained": nn.Linear(50, 40), "idle": nn.LayerNorm(4)})
    parts["frozen"].requires_grad_(False)
    return parts


def test_nothing_happened_and_nothing_moved() -> None:
    parts = model()
    weights = WeightWatch(parts)
    assert weights.moved(parts) == []
    assert weights.still(parts) == ["trained.weight", "trained.bias", "idle.weight", "idle.bias"]


def test_a_step_moves_what_it_trains() -> None:
    parts = model()
    weights = WeightWatch(parts)
    parts["trained"](torch.ones(50)).sum().backward()
    torch.optim.SGD(parts.parameters(), lr=0.1).step()
    assert weights.moved(parts) == []
    assert weights.still(parts) == ["idle.weight", "idle.bias"]


def test_a_frozen_tensor_that_was_scaled_is_named() -> None:
    parts = model()
    weights = WeightWatch(parts)
    with torch.no_grad():
        parts["frozen"].weight.mul_(1 + 1e-6)
    assert weights.moved(parts) == ["frozen.weight"]


def test_one_sampled_element_is_enough_and_the_sample_is_small() -> None:
    parts = model()
    weights = WeightWatch(parts)
    assert all(sample.numel() <= 4 * SAMPLE for sample in weights._frozen.values())
    with torch.no_grad():
        parts["frozen"].bias[7] += 1e-3
    assert weights.moved(parts) == ["frozen.bias"]


def test_one_element_that_moved_is_enough_for_a_trainable_tensor() -> None:
    parts = model()
    weights = WeightWatch(parts)
    with torch.no_grad():
        parts["trained"].bias[0] += 1e-6
    assert "trained.bias" not in weights.still(parts)


def test_nan_that_stays_nan_did_not_move() -> None:
    parts = model()
    with torch.no_grad():
        parts["frozen"].bias.fill_(torch.nan)
    assert WeightWatch(parts).moved(parts) == []


def test_a_parameter_frozen_later_is_no_longer_expected_to_move() -> None:
    parts = model()
    weights = WeightWatch(parts)
    parts["idle"].requires_grad_(False)
    assert weights.still(parts) == ["trained.weight", "trained.bias"] and weights.moved(parts) == []


def test_weights_of_eight_bits_are_watched_too() -> None:
    parts = model()
    parts["frozen"].weight = nn.Parameter(parts["frozen"].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    weights = WeightWatch(parts)
    assert weights.moved(parts) == []
    parts["frozen"].weight.data.view(torch.uint8).bitwise_xor_(1)
    assert weights.moved(parts) == ["frozen.weight"]


def test_of_a_parameter_that_zero_3_has_sharded_the_shard_is_watched() -> None:
    """DeepSpeed empties the parameter between uses and keeps this process's shard as an attribute of it."""
    parts = model()
    for parameter in parts.parameters():
        parameter.ds_tensor = parameter.detach().flatten()[: parameter.numel() // 2].clone()
        parameter.data = torch.empty(0)
    weights = WeightWatch(parts)
    assert weights.moved(parts) == [] and len(weights.still(parts)) == 4
    parts["frozen"].weight.ds_tensor.mul_(1.001)
    parts["trained"].weight.ds_tensor.mul_(1.001)
    assert weights.moved(parts) == ["frozen.weight"]
    assert weights.still(parts) == ["trained.bias", "idle.weight", "idle.bias"]
