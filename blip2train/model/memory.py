"""Parameters and strategy -> bytes that one device holds during the whole training, whatever the batch.

Concerns no equation of the paper. Frozen parts cost their weights alone; a trainable parameter also costs its gradient
and AdamW's two moments. LAVIS leaves this sum to its users.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from blip2train.errors import ConfigError
from blip2train.model.sharding import repeated_blocks

GIB = 2**30
_MOMENTS = 2
_ZERO3_GATHERED_ELEMENTS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`, which Lightning leaves: weights put together again for use, at most."""
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the devices of a run share a training.

    Args:
        devices: of all nodes.
        zero_stage: DeepSpeed's; None without DeepSpeed. 1 shards the optimizer's state, 2 also the gradients, 3 also
            the weights, frozen ones included.
        fsdp2: PyTorch's FSDP2, which shards what stage 3 does.
        offload: the optimizer's state lies in main memory.
        bucket_elements: of DeepSpeed's buffers, of which it holds two, since it overlaps communication.
    """

    devices: int = 1
    zero_stage: int | None = None
    fsdp2: bool = False
    offload: bool = False
    bucket_elements: int = 50_000_000

    def sharded(self, size: int, from_stage: int) -> int:
        """Bytes on this device of something that is sharded from this ZeRO stage on."""
        stage = 3 if self.fsdp2 else self.zero_stage or 0
        return size if stage < from_stage else -(-size // self.devices)


@dataclass(frozen=True, slots=True)
class Precision:
    """What a trainer's precision does to a model.

    Args:
        weights: format that the whole model is cast to; None leaves each part's own.
        autocast: format of the operations; None is no autocast.
    """

    weights: torch.dtype | None
    autocast: torch.dtype | None


def parse_precision(name: str) -> Precision:
    """Read Lightning's name ("32-true", "bf16-mixed", ...); the same under every strategy.

    Raises:
        ConfigError: not one of these.
    """
    number, _, kind = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(
        name, name
    ).partition("-")
    if number not in _DTYPES or kind not in {"true", "mixed"}:
        raise ConfigError(
            f"no estimate for precision {name!r}",
            where="trainer.precision",
            fix="one of 32-true, bf16-mixed, 16-mixed, bf16-true, 16-true",
        )
    if kind == "true":
        return Precision(None if number == "32" else _DTYPES[number], None)
    return Precision(None, _DTYPES[number])


def weight_bytes(model: nn.Module, sharing: Sharing) -> dict[str, int]:
    """Bytes of parameters by part and dtype ("vision_encoder float16"), tied ones once; and of buffers."""
    sizes: dict[str, int] = {}
    for name, tensor in model.named_parameters():
        key = f"{name.partition('.')[0]} {str(tensor.dtype).removeprefix('torch.')}"
        sizes[key] = sizes.get(key, 0) + tensor.numel() * tensor.element_size()
    sizes["buffers"] = sum(tensor.numel() * tensor.element_size() for tensor in model.buffers())
    return {key: sharing.sharded(size, from_stage=3) for key, size in sizes.items()}


def optimizer_bytes(model: nn.Module, sharing: Sharing) -> int:
    """AdamW's two moments in the format of the parameters; DeepSpeed adds a copy of the weights that it updates."""
    if sharing.offload:
        return 0
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if sharing.zero_stage is None:
        moments = sum(_MOMENTS * parameter.numel() * parameter.element_size() for parameter in trainable)
        return sharing.sharded(moments, from_stage=1)
    copies = _MOMENTS + 1
    return sharing.sharded(copies * 4 * sum(parameter.numel() for parameter in trainable), from_stage=1)


def gradient_bytes(model: nn.Module) -> int:
    """Gradients of all that trains, in the format of the parameters."""
    return sum(item.numel() * item.element_size() for item in model.parameters() if item.requires_grad)


def communication_bytes(model: nn.Module, sharing: Sharing) -> int:
    """DDP's buckets, a second copy of the gradients; DeepSpeed's two reduce buckets, of one size for any model.

    Sharded weights are gathered for use: by ZeRO-3 up to a fixed number, counted in full; by FSDP2 two blocks at a time
    and the root unit for the whole step, whose gradients are copied to leave together.
    """
    if sharing.fsdp2:
        return _gathered_units(model) + gradient_bytes(model) if sharing.devices > 1 else 0
    if sharing.zero_stage is not None:
        sizes = [item.element_size() for item in model.parameters() if item.requires_grad]
        buckets = 2 * sharing.bucket_elements * max(sizes, default=0)
        return buckets + (_gathered_bytes(model) if sharing.zero_stage == 3 and sharing.devices > 1 else 0)
    return gradient_bytes(model) if sharing.devices > 1 else 0


def _gathered_units(model: nn.Module) -> int:
    blocks = list(repeated_blocks(model))
    inside = {id(item) for block in blocks for item in block.parameters()}
    outside = sum(item.numel() * item.element_size() for item in model.parameters() if id(item) not in inside)
    sizes = [sum(item.numel() * item.element_size() for item in block.parameters()) for block in blocks]
    return outside + 2 * max(sizes, default=0)


def _gathered_bytes(model: nn.Module) -> int:
    elements = sum(item.numel() for item in model.parameters())
    size = sum(item.numel() * item.element_size() for item in model.parameters())
    return size if elements <= _ZERO3_GATHERED_ELEMENTS else size * _ZERO3_GATHERED_ELEMENTS // elements
