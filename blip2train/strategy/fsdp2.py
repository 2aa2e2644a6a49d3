"""FSDP2: weights, gradients and optimizer state sharded over all devices by PyTorch's `fully_shard`.

`model/sharding.py` says what is sharded together; the stages call it in `configure_model`. LAVIS knows DDP alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from blip2train import distributed
from blip2train.model.sharding import scalar_names, shard_like, whole_tensor
from blip2train.strategy.whole import WholeCheckpoint


class Fsdp2Strategy(WholeCheckpoint, ModelParallelStrategy):
    """Data parallel over all devices of all nodes, everything sharded; on GPUs by NCCL, on CPUs by gloo.

    Args:
        timeout: longest wait for the other ranks in a collective.
    """

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # "auto" would mean one per node
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as one process without sharding has it; complete on rank 0 alone, which writes it."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        state: dict[str, Any] = optimizer.state_dict()
        scalars = self._scalar_positions(optimizer)
        whole: dict[int, dict[str, Any]] = {}
        for position, entries in state["state"].items():
            tensors = {key: _gather(value, position in scalars) for key, value in entries.items()}
            if distributed.is_main():
                whole[position] = tensors
        return state | {"state": whole}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = _by_position(optimizer)
            pieces = {
                position: {key: _scatter(value, parameters[position], key) for key, value in entries.items()}
                for position, entries in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": pieces})

    def _scalar_positions(self, optimizer: Optimizer) -> set[int]:
        module = self.lightning_module
        assert module is not None
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        scalars = scalar_names(module)
        return {position for position, item in enumerate(_by_position(optimizer)) if names[id(item)] in scalars}


def _by_position(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _gather(value: Any, scalar: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    whole = whole_tensor(value)
    return whole.reshape(()) if scalar else whole


def _scatter(value: Any, parameter: nn.Parameter, key: str) -> Any:
    return shard_like(value, parameter) if isinstance(value, Tensor) and key != "step" else value
