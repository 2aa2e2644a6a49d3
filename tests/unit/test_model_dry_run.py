"""A model without memory: ties and formats survive, and operations keep what a GPU's kernels keep."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2train.model.dry_run import AcceleratorRules, FullMasks, fake_mode, to_fake
from blip2train.model.live_memory import LiveMemory

B, H, R, K = 2, 3, 64, 8


def test_tied_parameters_stay_tied_and_formats_stay() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.BatchNorm1d(4)})
    model["b"].weight = model["a"].weight
    model["a"].half().requires_grad_(False)
    with fake_mode():
        to_fake(model)
    assert model["b"].weight is model["a"].weight and model["a"].weight.dtype == torch.float16
    assert not model["a"].weight.requires_grad and model["c"].weight.requires_grad
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"}


def attention_kept(*, rules: bool, mask: Tensor | None = None) -> int:
    """Bytes that attention with dropout keeps beside its three inputs."""
    with fake_mode():
        inputs = [torch.zeros(B, H, R, K, requires_grad=True) for _ in range(3)]
        allowed = None if mask is None else torch.ones(mask.shape, dtype=torch.bool)
        with LiveMemory([*inputs, *([] if allowed is None else [allowed])]) as memory:
            if rules:
                with AcceleratorRules():
                    out = F.scaled_dot_product_attention(*inputs, attn_mask=allowed, dropout_p=0.1)
            else:
                out = F.scaled_dot_product_attention(*inputs, attn_mask=allowed, dropout_p=0.1)
            kept = sum(memory.alive.values())
            out.sum().backward()
        assert [item.grad.shape for item in inputs if item.grad is not None] == [item.shape for item in inputs]
    return kept


@pytest.mark.parametrize("mask", [None, torch.ones(B, 1, 1, R)])
def test_fused_attention_keeps_its_output_and_one_number_per_row_but_no_scores(mask: Tensor | None) -> None:
    output, log_sum = 4 * B * H * R * K, 4 * B * H * R
    assert attention_kept(rules=True, mask=mask) == output + log_sum + (0 if mask is None else 4 * B * R)
    assert attention_kept(rules=False, mask=mask) > 4 * B * H * R * R  # the CPU's kernel with dropout keeps scores


def test_dropout_keeps_a_byte_per_element() -> None:
    with fake_mode(), AcceleratorRules():
        rows = torch.zeros(100, 10, requires_grad=True)
        with LiveMemory([rows]) as memory:
            dropped = F.dropout(rows, 0.5)
            assert sum(memory.alive.values()) == 1000 * (4 + 1)
        assert F.dropout(rows, 0.5, training=False) is rows and dropped.shape == rows.shape


@pytest.mark.parametrize("operation", [lambda rows: F.layer_norm(rows, (8,)), lambda rows: rows.softmax(-1)])
def test_cudas_autocast_normalises_in_float32_and_multiplies_in_half(operation: nn.Module) -> None:
    with fake_mode(), AcceleratorRules(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = torch.zeros(4, 8) @ torch.zeros(8, 8)
        assert half.dtype == torch.bfloat16 and operation(half).dtype == torch.float32


def test_a_full_fake_mask_says_so() -> None:
    with fake_mode(), FullMasks():
        assert bool(torch.ones(3, 4, dtype=torch.bool).all())
