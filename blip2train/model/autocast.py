"""Full precision where it decides the result: heads of the stage-1 losses, contrastive logits, softmax and losses.

Not in the paper. bfloat16 keeps 8 bits, and a cosine divided by 0.07 needs more: features rounded to it move the logits
by 0.1. LAVIS leaves the choice to autocast, so its heads and contrastive logits are half precision on GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


def full_precision(tensor: Tensor) -> Tensor:
    """Half precision becomes float32, with gradient; float32 and float64 stay as they are."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Context in which no operation on the device of `tensor` is cast down."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def full_precision_linear(layer: nn.Linear, tensor: Tensor) -> Tensor:
    """A layer in float32 or better, whatever autocast says and whatever its weights are stored in."""
    with without_autocast(tensor):
        bias = None if layer.bias is None else full_precision(layer.bias)
        return F.linear(full_precision(tensor), full_precision(layer.weight), bias)
