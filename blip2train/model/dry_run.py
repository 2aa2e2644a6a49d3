"""A model on the meta device -> the same model of fake tensors, on which a whole training step runs without memory.

Concerns no equation of the paper. Fake tensors say they are on the CPU; `AcceleratorRules` gives their operations the
memory of CUDA's kernels and of CUDA's autocast, which keep other tensors for the backward pass than the CPU's do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

_HALF = (torch.float16, torch.bfloat16)

_FLOAT32_UNDER_AUTOCAST: frozenset[Callable[..., Any]] = frozenset({
    F.layer_norm, F.group_norm, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, Tensor.softmax,
    Tensor.log_softmax, torch.pow, Tensor.pow, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp, torch.norm,
    torch.linalg.vector_norm, Tensor.sum, torch.sum,
})  # fmt: skip
"""What these models use of the list that CUDA's autocast runs in float32 and the CPU's does not."""


def to_fake(model: nn.Module) -> nn.Module:
    """Replace, in place, every meta parameter and buffer by a fake CPU tensor; tied ones stay tied.

    Call under a FakeTensorMode.
    """
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)
    return model


def fake_mode() -> FakeTensorMode:
    """Under `with`, new tensors have shape, dtype and device, but no memory."""
    return FakeTensorMode()


class FullMasks(TorchFunctionMode):
    """Lets code ask a fake mask whether all of it is set. In a batch of full texts the answer is yes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__:
            return True
        return func(*args, **(kwargs or {}))


class AcceleratorRules(TorchFunctionMode):
    """Gives operations on the CPU the memory they have on a GPU.

    Attention is fused: it keeps its inputs, its output and one number per row, never the scores. Dropout keeps a byte
    per element. Autocast runs normalisations and softmax in float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        if func is F.dropout:
            return _drop_out(*args, **kwargs)
        if func in _FLOAT32_UNDER_AUTOCAST and torch.is_autocast_enabled("cpu"):
            args = tuple(item.float() if isinstance(item, Tensor) and item.dtype in _HALF else item for item in args)
        return func(*args, **kwargs)


def _drop_out(rows: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0:
        return rows
    dropped: Tensor = torch.native_dropout(rows, p, True)[0]
    return dropped


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bias = attn_mask.to(query.dtype) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
    attended: Tensor = _FusedAttention.apply(query, key, value, bias)  # type: ignore[no-untyped-call]
    return attended


class _FusedAttention(torch.autograd.Function):
    """The tensors that a fused attention kernel reads, keeps and returns; the numbers in them mean nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        *batch, rows, _ = query.shape
        # (B, R, H, K) in memory, as the kernels write it: joining the heads is then a view
        out = query.new_empty(batch[0], rows, *batch[1:], value.shape[-1]).transpose(1, 2)
        log_sum = query.new_empty(math.prod(batch), rows, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        query, key, value, _, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
