"""A train config -> what one device would need for it: weights, gradients, optimizer state and one measured step.

No weights, no data, no device: the step runs on fake tensors, in seconds.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from blip2train import distributed
from blip2train.batch import Stage1Batch, Stage2Batch
from blip2train.cli import check
from blip2train.cli.check_model import FSDP2, ZERO, check_strategy
from blip2train.cli.config import build
from blip2train.cli.dry_step import GRADIENTS, StepMemory, run_step, stage1_loss, stage2_loss
from blip2train.cli.meta import build_meta
from blip2train.errors import ConfigError
from blip2train.model.dry_run import AcceleratorRules, FullMasks, fake_mode, to_fake
from blip2train.model.live_memory import LiveMemory
from blip2train.model.memory import (
    Sharing,
    communication_bytes,
    gradient_bytes,
    optimizer_bytes,
    parse_precision,
    weight_bytes,
)
from blip2train.objective.context import ContextSettings
from blip2train.stage.probe import empty_stage1_batch, empty_stage2_batch


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes on one device.

    Args:
        fixed: what is held during the whole training, by name.
        step: what a step makes.
        sharing: how devices share the work.
        batch_size: pairs per device and micro-batch.
    """

    fixed: dict[str, int]
    step: StepMemory
    sharing: Sharing
    batch_size: int

    @property
    def kept(self) -> int:
        """When the loss is known."""
        return sum(self.fixed.values()) + sum(self.step.kept.values())

    @property
    def peak(self) -> int:
        """At the highest point of a step."""
        return sum(self.fixed.values()) + sum(self.step.peak.values())


def estimate(config: DictConfig, *, accelerator: bool = True, text_tokens: int | None = None) -> Estimate:
    """Estimate the memory of a training.

    Args:
        config: a composed and checked train config.
        accelerator: count as on a GPU; False counts what the CPU's kernels keep.
        text_tokens: length of every text; None takes the longest that the collator lets through.

    Raises:
        ConfigError: a strategy, precision or number of devices that cannot be estimated.
    """
    sharing = read_sharing(config)
    precision = parse_precision(str(config.trainer.get("precision") or "32-true"))
    model = build_meta(config)
    if precision.weights is not None:
        model = model.to(precision.weights)
    keep = int(config.trainer.get("accumulate_grad_batches", 1)) > 1
    shard = (sharing.zero_stage or 0) >= 2
    rules = AcceleratorRules() if accelerator else contextlib.nullcontext()
    with fake_mode(), FullMasks(), rules, distributed.pretend_world(sharing.devices):
        to_fake(model).train()
        step = run_step(
            model,
            loss_of(config, model),
            lambda: full_batch(config, model, text_tokens),
            autocast=precision.autocast,
            keep_gradients=keep,
            shard_gradients=shard,
        )
    fixed = {f"weights: {name}": size for name, size in weight_bytes(model, sharing).items()}
    fixed["optimizer state"] = optimizer_bytes(model, sharing)
    fixed["communication buffers"] = communication_bytes(model, sharing)
    if shard:
        fixed[GRADIENTS] = sharing.sharded(gradient_bytes(model), from_stage=2)
    return Estimate(fixed, step, sharing, check.device_batch(config))


def read_sharing(config: DictConfig) -> Sharing:
    """Devices and strategy of a config.

    Raises:
        ConfigError: a number of devices that only Lightning knows, or a strategy that no training takes.
    """
    trainer = config.trainer
    devices = trainer.get("devices", 1)
    if not isinstance(devices, int) or devices < 1:
        raise ConfigError(
            f"trainer.devices is {devices!r}", where="trainer.devices", fix="give the number of devices of one node"
        )
    devices *= int(trainer.get("num_nodes", 1))
    check_strategy(config)
    strategy = trainer.get("strategy", "auto")
    name = str(strategy.get("_target_", "") if isinstance(strategy, DictConfig) else strategy)
    if name == ZERO:
        return Sharing(
            devices,
            zero_stage=int(strategy.stage),
            offload=bool(strategy.get("offload_optimizer", False)),
            bucket_elements=int(strategy.get("bucket_elements", Sharing().bucket_elements)),
        )
    return Sharing(devices, fsdp2=name == FSDP2)


def loss_of(config: DictConfig, model: Any) -> Callable[[Any, LiveMemory], Tensor]:
    """The loss of a config's stage as a function of a batch, with its objectives; labels what it makes."""
    if check.stage_number(config) == 1:
        objectives = {name: objective for name, objective in build(config.stage.objectives).items() if objective.weight}
        if not objectives:
            raise ConfigError("no loss has a weight", where="stage.objectives", fix="keep one of itc, itm, itg")
        stage = config.stage
        settings = ContextSettings(stage.gather_gradients, stage.global_means, stage.micro_batch_size)
        return functools.partial(stage1_loss, model, objectives, settings)
    return functools.partial(stage2_loss, model, build(config.stage.objective))


def full_batch(config: DictConfig, model: Any, text_tokens: int | None = None) -> Stage1Batch | Stage2Batch:
    """A batch of one device with texts of full length, the collator's `max_tokens` where no other is given."""
    size, collator, encoder = check.device_batch(config), config.data.collator, model.vision_encoder
    length = text_tokens or int(collator.max_tokens)
    if check.stage_number(config) == 1:
        return empty_stage1_batch(encoder, size, length)
    has_prompt = bool(collator.get("prefix_split", False) or collator.get("prompt", ""))
    return empty_stage2_batch(encoder, size, length if has_prompt else 0, length)
