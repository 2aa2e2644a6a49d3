"""DeepSpeed ZeRO 1 to 3: optimizer state, then gradients, then weights sharded over all devices.

The maths is DDP's: float32 weights under autocast, where Lightning's own DeepSpeed strategy casts the whole model to
half precision, frozen parts included. It also runs on CPUs, by gloo, which Lightning's refuses. Stage 3's linear layers
add their bias apart, so that no weight is held for the backward pass: their last digits differ.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import DeepSpeedPrecision, Precision
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from blip2train.errors import ConfigError
from blip2train.model.freezing import checkpoint_names, checkpoint_state_dict
from blip2train.model.sharding import give_scalars_a_dimension, scalar_names
from blip2train.strategy.whole import WholeCheckpoint
from blip2train.strategy.zero_state import gradient_norm, load_optimizer_state, make_state, whole_optimizer_state

AUTOCAST = {"32-true": None, "bf16-mixed": "bfloat16"}
"""Precisions under which ZeRO computes what DDP does; 16-mixed needs a loss scaler, which no checkpoint would hold."""


class ZeroPrecision(DeepSpeedPrecision):
    """Leaves module and batch in the formats they have: the engine's autocast chooses per operation, as under DDP."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def tensor_init_context(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


class ZeroStrategy(WholeCheckpoint, DeepSpeedStrategy):
    """DeepSpeed's engine around a model built whole on every rank (in main memory for stage 3), then partitioned.

    `zero.Init`, which partitions while building, is not used: weight files are read into whole parameters.

    Args:
        stage: 1 shards the optimizer's state, 2 also gradients, 3 also weights, frozen ones included.
        timeout: longest wait for the other ranks in a collective.
        offload_optimizer: keep optimizer state in main memory and update there, with torch's AdamW: nothing is
            compiled. Stages 1 and 2.
        bucket_elements: gradients that are reduced together; two such buffers are held.
        persistent_elements: smaller weights stay whole on every rank. Stage 3.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """

    def __init__(
        self,
        stage: int,
        timeout: timedelta,
        offload_optimizer: bool = False,
        bucket_elements: int = 50_000_000,
        persistent_elements: int = 100_000,
    ) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(
                "DeepSpeed is not installed",
                where="trainer.strategy",
                fix="pip install 'blip2train[deepspeed]', or trainer=fsdp2, which shards without it",
            )
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it looks for a device and says so where it finds none
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            reduce_bucket_size=bucket_elements,
            allgather_bucket_size=bucket_elements,
            logging_batch_size_per_gpu=1,  # Lightning would make a loader to find it out
            timeout=timeout,
        )
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = persistent_elements
        # 0: weights are let go after each use. Else stage 3 looks through the rest of the step for each module that
        # ends, on the host: a step in micro-batches, of 1,700 modules, took 44 s instead of 2
        self.config["zero_optimization"]["stage3_max_reuse_distance"] = 0
        self._positions: list[nn.Parameter] = []
        self._linear = nn.functional.linear

    @property
    def precision_plugin(self) -> Precision:
        return self._precision_plugin if self._precision_plugin is not None else Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, DeepSpeedPrecision):
            precision: Any = plugin.precision
            check_zero_precision(precision)
            plugin = ZeroPrecision(precision)
        self._precision_plugin = plugin

    def setup_environment(self) -> None:
        if self.root_device.type == "cpu":
            _prepare_cpu()
        super(DeepSpeedStrategy, self).setup_environment()  # DeepSpeedStrategy's own refuses everything but CUDA

    def setup_distributed(self) -> None:
        if self.root_device.type != "cpu":
            super().setup_distributed()
            return
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        give_scalars_a_dimension(self.lightning_module)
        super().setup(trainer)

    def _format_config(self) -> None:
        assert isinstance(self.config, dict)
        self._format_batch_size_and_grad_accum_config()
        autocast = AUTOCAST[str(self.precision_plugin.precision)]
        if autocast is not None:
            # an empty list of modules: gradients and gathered weights travel in float32
            self.config["torch_autocast"] = {"enabled": True, "dtype": autocast, "lower_precision_safe_modules": []}

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        yield

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        import deepspeed

        assert optimizer is not None
        self._positions = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._linear = nn.functional.linear
        engine, zero_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index or 0),
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        make_state(zero_optimizer, step=0.0)
        return engine, zero_optimizer

    def teardown(self) -> None:
        nn.functional.linear = self._linear  # stage 3 puts its own there, with other rounding, for the whole process
        super().teardown()

    def gradient_norm(self) -> Tensor | None:
        """L2 norm of the whole gradient before clipping, 0-dim, the same on all ranks; a collective.

        None between two micro-batches: the gradient is not whole yet.
        """
        if not self.deepspeed_engine.is_gradient_accumulation_boundary():
            return None
        return gradient_norm(self.optimizers[0])

    def whole_weights(self, model: nn.Module) -> dict[str, Tensor]:
        if not self.zero_stage_3:
            return checkpoint_state_dict(model)
        import deepspeed

        state, scalars = {}, scalar_names(model)
        for name in checkpoint_names(model):
            parameter = model.get_parameter(name)
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().cpu().clone()
            state[name] = whole.reshape(()) if name in scalars else whole
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as one process without sharding has it; complete on rank 0 alone, which writes it."""
        module = self.lightning_module
        assert module is not None
        scalars = {id(module.get_parameter(name)) for name in scalar_names(module)}
        return whole_optimizer_state(self.optimizers[0], self._positions, scalars)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        load_optimizer_state(self.optimizers[0], self._positions, checkpoint["optimizer_states"][0])


def check_zero_precision(precision: str) -> None:
    """Refuse a precision that ZeRO would compute otherwise than DDP.

    Raises:
        ConfigError: neither 32-true nor bf16-mixed.
    """
    if precision not in AUTOCAST:
        raise ConfigError(
            f"DeepSpeed under trainer.precision={precision}",
            where="trainer.precision, trainer.strategy",
            fix=f"one of {', '.join(AUTOCAST)}; trainer=ddp or trainer=fsdp2 for another",
        )


def _prepare_cpu() -> None:
    """Let DeepSpeed run on CPUs with what PyTorch has: no compiler is called."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        raise ConfigError(
            "DeepSpeed has chosen the GPU of this machine, the trainer the CPU",
            where="trainer.accelerator=cpu",
            fix="set DS_ACCELERATOR=cpu in the environment",
        )
    importlib.import_module("deepspeed.comm.torch")
    # an extension for ranks of one machine, built by a C++ compiler on first use; gloo serves without
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
