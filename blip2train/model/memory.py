"""Parameters and strategy -> bytes that one device holds during the whole training, whatever the batch.

Concerns no equation of the paper. Frozen parts cost their weights alone; a trainable parameter also costs its gradient
and AdamW's two moments. LAVIS leaves this sum to its users.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from blip2train.errors import ConfigError

GIB = 2**30
_MOMENTS = 2
_ZERO_BUCKET_ELEMENTS = 200_000_000
"""Lightning's `reduce_bucket_size`; two of them, since it overlaps communication."""
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
    """

    devices: int = 1
    zero_stage: int | None = None

    def sharded(self, size: int, from_stage: int) -> int:
        """Bytes on this device of something that is sharded from this ZeRO stage on."""
        return size if self.zero_stage is None or self.zero_stage < from_stage else -(-size // self.devices)


@dataclass(frozen=True, slots=True)
class Precision:
    """What a trainer's precision does to a model.

    Args:
        weights: format that the whole model is cast to; None leaves each part's own.
        autocast: format of the operations; None is no autocast.
    """

    weights: torch.dtype | None
    autocast: torch.dtype | None


def parse_precision(name: str, *, deepspeed: bool) -> Precision:
    """Read Lightning's name ("32-true", "bf16-mixed", ...).

    DeepSpeed has no autocast: under a mixed precision it casts the model and keeps float32 copies of what trains.

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
    return Precision(_DTYPES[number], None) if deepspeed else Precision(None, _DTYPES[number])


def weight_bytes(model: nn.Module, sharing: Sharing) -> dict[str, int]:
    """Bytes of parameters by part and dtype ("vision_encoder float16"), tied ones once; and of buffers."""
    sizes: dict[str, int] = {}
    for name, tensor in model.named_parameters():
        key = f"{name.partition('.')[0]} {str(tensor.dtype).removeprefix('torch.')}"
        sizes[key] = sizes.get(key, 0) + tensor.numel() * tensor.element_size()
    sizes["buffers"] = sum(tensor.numel() * tensor.element_size() for tensor in model.buffers())
    return {key: sharing.sharded(size, from_stage=3) for key, size in sizes.items()}


def optimizer_bytes(model: nn.Module, sharing: Sharing) -> int:
    """AdamW's two moments in the format of the parameters; under DeepSpeed float32, with a copy of the weights."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if sharing.zero_stage is None:
        return sum(_MOMENTS * parameter.numel() * parameter.element_size() for parameter in trainable)
    copies = _MOMENTS + 1
    return sharing.sharded(copies * 4 * sum(parameter.numel() for parameter in trainable), from_stage=1)


def gradient_bytes(model: nn.Module) -> int:
    """Gradients of all that trains, in the format of the parameters."""
    return sum(item.numel() * item.element_size() for item in model.parameters() if item.requires_grad)


def communication_bytes(model: nn.Module, sharing: Sharing) -> int:
    """DDP's buckets, a second copy of the gradients; DeepSpeed's two reduce buckets, of one size for any model.

    ZeRO-3 gathers sharded weights for each pass and holds up to a fixed number of them: counted in full.
    """
    if sharing.zero_stage is not None:
        sizes = [item.element_size() for item in model.parameters() if item.requires_grad]
        buckets = 2 * _ZERO_BUCKET_ELEMENTS * max(sizes, default=0)
        return buckets + (_gathered_bytes(model) if sharing.zero_stage == 3 and sharing.devices > 1 else 0)
    return gradient_bytes(model) if sharing.devices > 1 else 0


def _gathered_bytes(model: nn.Module) -> int:
    elements = sum(item.numel() for item in model.parameters())
    size = sum(item.numel() * item.element_size() for item in model.parameters())
    return size if elements <= _ZERO3_GATHERED_ELEMENTS else size * _ZERO3_GATHERED_ELEMENTS // elements
