"""Trainings on two ranks that write the sharded folder of plain Lightning beside each of our own, whole checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn

from blip2train.run_dir import RunDir
from blip2train.strategy.fsdp2 import Fsdp2Strategy
from blip2train.strategy.whole import WholeCheckpoint
from blip2train.strategy.zero import ZeroStrategy, _prepare_cpu
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
    def save_both(
        self: Strategy, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
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


def save_engine(rank: int, folder: str, config: dict[str, Any], exclude_frozen: bool) -> dict[str, Tensor]:
    """One step of a small model under DeepSpeed's own engine, then its folder; returns the float32 masters, whole.

    For `on_two_ranks`: what Lightning's strategy made of this project's earlier trainings, half precision included.
    """
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}
    _prepare_cpu()
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.BatchNorm1d(3, affine=False))
    model[0].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True} | config
    deepspeed.init_distributed("gloo")
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    engine.backward(engine(torch.ones(4, 5).to(next(model.parameters()).dtype) * (1 + rank)).float().square().sum())
    engine.step()
    engine.save_checkpoint(folder, client_state={"epoch": 1}, exclude_frozen_parameters=exclude_frozen)
    return {
        name: safe_get_full_fp32_param(item).clone() for name, item in model.named_parameters() if item.requires_grad
    }
