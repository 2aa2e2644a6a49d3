"""What the two stages share: functions, not a base class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

WeightLoader = Callable[[nn.Module], None]
"""Fills a freshly built model: from stage 1, from a checkpoint being resumed, or not at all."""


class StepOutput(TypedDict):
    """What `training_step` returns: Lightning reads `loss`, callbacks read the rest."""

    loss: Tensor
    metrics: dict[str, Tensor]
    samples: int


def seed_batch(seed: int, batch_index: int, rank: int, device: torch.device) -> torch.Generator:
    """Make all randomness of one batch a function of its index, so that a resumed run repeats it exactly.

    Seeds the global generators (dropout) and returns one on `device` for sampling hard negatives.
    """
    mixed = (seed * 1_000_003 + batch_index) * 8_191 + rank
    torch.manual_seed(mixed % (2**63))
    generator = torch.Generator(device=device)
    generator.manual_seed((mixed + 1) % (2**63))
    return generator


def build_seeded(build_model: Callable[[], nn.Module], seed: int, load: WeightLoader | None) -> nn.Module:
    """Build a model whose initial weights depend on `seed` alone, then fill it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model()
    if load is not None:
        load(model)
    return model


def strip_weights(checkpoint: dict[str, Any]) -> None:
    """Keep model weights out of Lightning's file: they lie beside it as safetensors, trainable ones only."""
    checkpoint["state_dict"] = {}


def prefixed(name: str, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Metrics under the log keys of the run folder: `train/itc_loss`, `train/itm_accuracy`."""
    return {f"train/{key if key.startswith(name) else f'{name}_{key}'}": value for key, value in metrics.items()}
