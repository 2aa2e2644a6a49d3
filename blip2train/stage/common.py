"""What the two stages share: functions, not a base class."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from blip2train import distributed
from blip2train.model.freezing import set_aside
from blip2train.model.idle import idle_parameters

log = logging.getLogger(__name__)

WeightLoader = Callable[[nn.Module], None]
"""Fills a freshly built model: from stage 1, from a checkpoint being resumed, or not at all."""


class StepOutput(TypedDict):
    """What `training_step` returns: Lightning reads `loss`, callbacks read the rest."""

    loss: Tensor
    metrics: dict[str, Tensor]
    samples: int


def seed_batch(seed: int, batch_index: int, rank: int) -> None:
    """Make all randomness of one batch a function of its index, so that a resumed run repeats it exactly.

    Seeds the global generators of torch (dropout), of Python and of numpy: no state of theirs is part of a checkpoint,
    and a user's own part may draw from any of them. Hard negatives need none: `objective.draw` makes them of seed
    and index.
    """
    mixed = (seed * 1_000_003 + batch_index) * 8_191 + rank
    torch.manual_seed(mixed % (2**63))
    random.seed(mixed)
    np.random.seed(mixed % (2**32))


def build_seeded(build_model: Callable[[], nn.Module], seed: int, load: WeightLoader | None) -> nn.Module:
    """Build a model whose initial weights depend on `seed` alone, then fill it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model()
    if load is not None:
        load(model)
    return model


def prepare_weights(module: pl.LightningModule, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """After building and filling: set aside what no loss reaches, and shard the rest where the strategy wants it.

    Args:
        module: holds `model`; its training step runs the model.
        model: whole.
        loss: of a tiny batch, with all objectives of the run.
    """
    idle = idle_parameters(model, loss)
    if idle:
        set_aside(model, idle)
    if idle and distributed.is_main():
        log.info("not trained by any loss of this run, kept as they are: %s", summarize_names(idle))
    if module.device_mesh is not None:  # the strategy is FSDP2
        from blip2train.model.sharding import shard

        shard(module, module.device_mesh["data_parallel"], step="training_step")


def summarize_names(names: Sequence[str], depth: int = 3) -> str:
    """Parameter names, cut to the module they belong to where several share it."""
    return ", ".join(dict.fromkeys(".".join(name.split(".")[:depth]) for name in names))


def strip_weights(checkpoint: dict[str, Any]) -> None:
    """Keep model weights out of Lightning's file: they lie beside it as safetensors, trainable ones only."""
    checkpoint["state_dict"] = {}


def prefixed(name: str, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Metrics under the log keys of the run folder: `train/itc_loss`, `train/itm_accuracy`."""
    return {f"train/{key if key.startswith(name) else f'{name}_{key}'}": value for key, value in metrics.items()}
