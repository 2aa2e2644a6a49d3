"""Which trainable parameters do the losses of a run never reach? Asked of one tiny step on fake tensors, in seconds.

An ablation may leave a head without gradient: DDP would wait for it, or search the graph in every step for what is
missing, as LAVIS lets it. What is found here is set aside once (`freezing.set_aside`), and every parameter that trains
has a gradient in every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from blip2train import distributed
from blip2train.model.dry_run import FullMasks, fake_mode, to_fake


def idle_parameters(model: nn.Module, loss: Callable[[], Tensor]) -> list[str]:
    """Names of the trainable parameters that are not in the graph of a loss.

    Nothing is computed, no random number drawn, nothing sent to other ranks; the model is left as it was.

    Args:
        model: whole, on any device.
        loss: runs `model` on a batch that it makes; called once, with fake weights in the model.
    """
    with _untouched(), distributed.pretend_world(1), fake_mode(), FullMasks(), _fake_weights(model):
        names = {name: item for name, item in model.named_parameters() if item.requires_grad}
        reached = _leaves(loss())
        return [name for name, item in names.items() if id(item) not in reached]


@contextlib.contextmanager
def _untouched() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        yield


@contextlib.contextmanager
def _fake_weights(model: nn.Module) -> Iterator[None]:
    owners: list[dict[str, Any]] = [
        tensors for module in model.modules() for tensors in (module._parameters, module._buffers)
    ]
    before = [dict(tensors) for tensors in owners]
    try:
        to_fake(model)
        yield
    finally:
        for tensors, real in zip(owners, before, strict=True):
            tensors.update(real)


def _leaves(loss: Tensor) -> set[int]:
    """Identities of the leaf tensors in the graph of `loss`."""
    found: set[int] = set()
    seen: set[Any] = set()
    open_nodes: list[Any] = [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        open_nodes += [above for above, _ in node.next_functions]
    return found
