"""Full precision where it decides the result: contrastive logits, softmax and losses.

Below the objectives' arrow (features -> loss): bfloat16 keeps 8 bits, and a cosine divided by 0.07 needs more.
LAVIS leaves the choice to autocast, so its contrastive logits are half precision on GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def full_precision(tensor: Tensor) -> Tensor:
    """Half precision becomes float32, with gradient; float32 and float64 stay as they are."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Context in which no operation on the device of `tensor` is cast down."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)
