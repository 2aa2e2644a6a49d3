"""Sharded weights and optimizer state <-> whole tensors in one plain file, the same under every strategy.

What plain DDP writes is the format: optimizer state by the position of its parameter, weights by name in a safetensors
file beside it. So a run continues under any strategy, and nothing needs consolidating. Lightning's own sharded
strategies write folders that only they read; LAVIS knows DDP alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import Strategy
from torch import Tensor, nn

from blip2train.model.freezing import checkpoint_state_dict


def whole_state_dict(trainer: pl.Trainer) -> dict[str, Tensor]:
    """The weights that a checkpoint holds, whole, by their name in the model.

    A collective under sharding: call it on all ranks; every rank gets all of it, sharded weights on the CPU.

    Args:
        trainer: its module's `model` is meant.
    """
    model = trainer.lightning_module.model
    assert isinstance(model, nn.Module)
    strategy = trainer.strategy
    return strategy.whole_weights(model) if isinstance(strategy, WholeCheckpoint) else checkpoint_state_dict(model)


class WholeCheckpoint(Strategy):
    """What a sharded strategy is mixed with to read and write the files of an unsharded one.

    Weights are in no file of Lightning's: `configure_model` has filled the model before it is sharded.
    """

    def whole_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """What `checkpoint_state_dict` gives of an unsharded model; on all ranks."""
        return checkpoint_state_dict(model)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing to do, see the class."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)
