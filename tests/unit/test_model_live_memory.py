"""Counting what is alive: exact on a case done by hand, equal on fake and real tensors and to the allocator's log."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from blip2train.model.dry_run import fake_mode
from blip2train.model.live_memory import LiveMemory

MIB = 2**20


def allocator_peak(run: Callable[[], object]) -> int:
    """The highest sum of the CPU allocator's own log, workspaces of kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        run()
    events = log.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    total = peak = 0
    for _, size in changes:
        total += size
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize("context", [contextlib.nullcontext, fake_mode], ids=["real", "fake"])
def test_bytes_by_hand(context: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
    with context():
        weight = torch.zeros(256, 256, requires_grad=True)
        with LiveMemory([weight]) as memory:
            with memory.labelled("input"):
                rows = torch.ones(1024, 256)
            with memory.labelled("product"):
                product = rows @ weight
            doubled = product * 2  # keeps nothing for the backward pass
            del product
            assert memory.alive == {"input": MIB, "other": MIB}
            loss = doubled.view(-1).sum()
            del doubled
            assert memory.alive == {"input": MIB, "other": 4}
            memory.watch(loss, "loss")
            with memory.labelled("backward"):
                loss.backward()
            # one number is expanded to 1024 x 256, doubled, and multiplied into the gradient, 256 x 256
            assert memory.alive == {"input": MIB, "loss": 4, "backward": MIB // 4}
            assert memory.peak == {"input": MIB, "product": MIB, "other": MIB}


def test_views_and_parameters_cost_nothing() -> None:
    weight = torch.zeros(64, 64)
    with LiveMemory([weight]) as memory:
        kept = [weight.T, weight[0], weight.view(-1), weight.mul_(2)]
        assert memory.alive == {} and len(kept) == 4


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_peak_of_a_step_is_the_allocators(autocast: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 1000))
    memory = LiveMemory([*model.parameters()])

    def loss() -> Tensor:
        rows, targets = torch.ones(300, 128), torch.zeros(300, dtype=torch.int64)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            return nn.functional.cross_entropy(model(rows).float(), targets)

    def step() -> None:
        with memory:
            loss().backward()  # type: ignore[no-untyped-call]

    assert allocator_peak(step) == pytest.approx(sum(memory.peak.values()), rel=0.01)
