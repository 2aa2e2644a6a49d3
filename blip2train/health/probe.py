"""A forward pass -> the first module whose output is not finite, and whether its input or its weights already were not.

Hooks see modules in the order in which they finish, inner ones before the outer; what functional code between two
modules does shows as an input that is not finite.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Probe:
    """What the pass under `watch` found: `first` is None where every module's output was finite."""

    def __init__(self) -> None:
        self.first: dict[str, Any] | None = None

    def look(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.first is not None:
            return
        found = [tensor for tensor in tensors_in(output) if not is_finite(tensor)]
        if not found:
            return
        weights = [key for key, value in module.named_parameters(recurse=False) if not is_finite(value)]
        self.first = {
            "module": name,
            "class": type(module).__name__,
            "input_finite": all(is_finite(tensor) for tensor in tensors_in(inputs)),
            "weights_not_finite": weights,
            "output_shape": list(found[0].shape),
            "rows": bad_rows(found[0]),
            "nan": int(torch.isnan(found[0]).sum()),
            "infinite": int(torch.isinf(found[0]).sum()),
        }


@contextlib.contextmanager
def watch(root: nn.Module) -> Iterator[Probe]:
    """Under `with`, every module's output is checked; each check waits for the device."""
    probe = Probe()

    def hook(name: str) -> Any:
        return lambda module, args, kwargs, output: probe.look(name, module, (args, kwargs), output)

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True) for name, module in root.named_modules() if name
    ]
    try:
        yield probe
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a value built of tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def bad_rows(value: Tensor) -> list[int]:
    """Places along the first dimension, usually the batch's, at which something is not finite."""
    if not value.ndim:
        return []
    places: list[int] = (~torch.isfinite(value.reshape(len(value), -1)).all(dim=1)).nonzero()[:, 0].tolist()
    return places


def is_finite(value: Tensor) -> bool:
    """Whether this process's part of a tensor is free of NaN and infinity; integers and 8-bit formats count as such."""
    local = local_part(value)
    if not local.is_floating_point() or local.dtype.itemsize == 1:  # torch cannot ask an 8-bit number
        return True
    return bool(torch.isfinite(local).all())


def local_part(value: Tensor) -> Tensor:
    """What this process holds of a parameter or gradient, detached: the shard under FSDP2 and ZeRO-3, or the whole."""
    if hasattr(value, "to_local"):
        local: Tensor = value.detach().to_local()  # type: ignore[attr-defined]
        return local
    shard: Tensor | None = getattr(value, "ds_tensor", None)  # of the parameter itself: a detached one has none
    return (value if shard is None else shard).detach()
