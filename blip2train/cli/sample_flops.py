"""A train config -> the floating-point operations that its mathematics needs for one sample, without running it.

One step on fake tensors at two lengths of text, under torch's counter. What is only computed again to save memory does
not count, padding neither; of a frozen language model what carries the gradient to the visual prompt does.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blip2train import distributed
from blip2train.callback.compute import SampleFlops
from blip2train.cli import check
from blip2train.cli.estimate import full_batch, loss_of
from blip2train.cli.meta import build_meta
from blip2train.model.dry_run import FullMasks, fake_mode, to_fake
from blip2train.model.live_memory import LiveMemory


def count_sample_flops(config: DictConfig) -> SampleFlops:
    """Count the operations of a training step of a composed and checked config.

    Texts of two lengths give a straight line; attention among text tokens bends it by less than a percent.

    Raises:
        ConfigError: the shape of the language model is not known without reading it.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    parts = {name: plain[name] for name in ("model", "stage", "llm") if name in plain}
    parts["data"] = {name: plain["data"].get(name) for name in ("batch_size", "global_batch_size", "collator")}
    return _count(json.dumps(parts, sort_keys=True), check.num_devices(config) or 1)


@functools.cache  # a sweep trains many configs that differ in a learning rate
def _count(parts: str, devices: int) -> SampleFlops:
    config = OmegaConf.create(json.loads(parts))
    config.trainer = {"devices": devices}
    longest = int(config.data.collator.max_tokens)
    tokens, flops = zip(*(_step(config, devices, length) for length in (max(longest // 2, 1), longest)), strict=True)
    slope = (flops[1] - flops[0]) / max(tokens[1] - tokens[0], 1)
    return SampleFlops(flops[1] - slope * tokens[1], slope)


def _step(config: DictConfig, devices: int, length: int) -> tuple[float, float]:
    """Tokens and operations per sample of one forward and backward pass."""
    model = build_meta(config)
    for module in model.modules():
        if hasattr(module, "checkpoint_activations"):
            module.checkpoint_activations = False  # type: ignore[assignment]
    counter = FlopCounterMode(display=False)
    with fake_mode(), FullMasks(), distributed.pretend_world(devices):
        to_fake(model).train()
        batch = full_batch(config, model, length)
        # attention's fused kernels on the CPU are unknown to the counter, its plain products are not
        with sdpa_kernel(SDPBackend.MATH), counter:
            loss_of(config, model)(batch, LiveMemory()).backward()  # type: ignore[no-untyped-call]
    size = len(batch)
    masks = (getattr(batch, name, None) for name in ("attention_mask", "prompt_mask", "target_mask"))
    return sum(mask.shape[1] for mask in masks if mask is not None), counter.get_total_flops() / size
