"""The model's weights at the start and now -> frozen ones that moved, trainable ones that never do.

Of a frozen tensor a sample of its elements is kept, of a trainable one two sums: no second copy of the model. Under
sharding each process looks at its own shards.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip2train.health.probe import local_part

SAMPLE = 64
"""Elements kept of each frozen tensor, evenly spread: a change of single others goes unseen."""


class WeightWatch:
    """Remembers a model's weights as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._frozen = {name: _sample(value) for name, value in _parameters(model, trainable=False)}
        self._trained = {name: _sums(value) for name, value in _parameters(model, trainable=True)}

    def moved(self, model: nn.Module) -> list[str]:
        """Frozen parameters whose sample differs from the start."""
        known = [(name, value) for name, value in _parameters(model, trainable=False) if name in self._frozen]
        return _where([(name, _differs(_sample(value), self._frozen[name])) for name, value in known])

    def still(self, model: nn.Module) -> list[str]:
        """Trainable parameters that are, as far as their sums tell, what they were."""
        known = [(name, value) for name, value in _parameters(model, trainable=True) if name in self._trained]
        return _where([(name, ~_differs(_sums(value), self._trained[name])) for name, value in known])

    @property
    def trained(self) -> list[str]:
        """Names of the trainable parameters of which this process holds a part."""
        return list(self._trained)


def _parameters(model: nn.Module, *, trainable: bool) -> list[tuple[str, Tensor]]:
    """Name and local part; parts that are empty on this process are another's to watch."""
    found = [
        (name, local_part(parameter))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad == trainable
    ]
    return [(name, value) for name, value in found if value.numel()]


def _sample(value: Tensor) -> Tensor:
    flat = value.reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].clone().view(torch.uint8)


def _sums(value: Tensor) -> Tensor:
    wide = value.reshape(-1).to(torch.float64)
    return torch.stack([wide.sum(), wide.square().sum()]).view(torch.uint8)


def _differs(now: Tensor, before: Tensor) -> Tensor:
    """0-dim bool, without waiting for the device. By their bits: NaN equals itself, and any format can be compared."""
    if now.shape != before.shape:  # sharded now and whole then, or the reverse: nothing can be said
        return torch.zeros((), dtype=torch.bool, device=now.device)
    return (now != before).any()


def _where(flags: list[tuple[str, Tensor]]) -> list[str]:
    if not flags:
        return []
    hits = torch.stack([flag.to(flags[0][1].device) for _, flag in flags]).tolist()
    return [name for (name, _), hit in zip(flags, hits, strict=True) if hit]
