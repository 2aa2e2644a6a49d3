"""Trainings on two ranks that write the sharded folder of plain Lightning beside each of our own, whole checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy

from blip2train.run_dir import RunDir
from blip2train.strategy.fsdp2 import Fsdp2Strategy
from blip2train.strategy.whole import WholeCheckpoint
from blip2train.strategy.zero import ZeroStrategy
from tests.strategy_world import train_all, train_on_two_ranks

SHARDED = "sharded"
"""Name of that folder, in the run folder; the last checkpoint's."""


def train_sharded(own: Path, jobs: list[list[str]]) -> list[RunDir]:
    """As `strategy_world.train_on_two_ranks`."""
    return train_on_two_ranks(own, jobs, _train_all)


def _train_all(rank: int, port: int, jobs: list[list[str]]) -> None:
    ZeroStrategy.save_checkpoint = _twice(DeepSpeedStrategy.save_checkpoint)  # type: ignore[method-assign]
    Fsdp2Strategy.save_checkpoint = _twice(_save_fsdp2)  # type: ignore[method-assign]
    train_all(rank, port, jobs)


def _twice(save: Callable[[Any, dict[str, Any], Path], None]) -> Callable[..., None]:
    def save_both(self: Strategy, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        save(self, dict(checkpoint), Path(filepath).parents[2] / SHARDED)
        WholeCheckpoint.save_checkpoint(self, checkpoint, filepath, storage_options)  # type: ignore[arg-type]

    return save_both


def _save_fsdp2(strategy: Any, checkpoint: dict[str, Any], folder: Path) -> None:
    strategy._save_distributed_checkpoint = True  # from here on its states are shards
    checkpoint["state_dict"] = ModelParallelStrategy.lightning_module_state_dict(strategy)
    checkpoint["optimizer_states"] = [
        ModelParallelStrategy.optimizer_state(strategy, optimizer) for optimizer in strategy.optimizers
    ]
    ModelParallelStrategy.save_checkpoint(strategy, checkpoint, folder)
    strategy._save_distributed_checkpoint = False
