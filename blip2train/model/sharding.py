"""A whole model -> the same model with its weights spread over the devices of a mesh, by PyTorch's FSDP2.

Units are gathered for their own forward pass and let go after it: blocks of the vision encoder and layers of the
language model, where nearly all bytes are. The Q-Former, its heads and all else form the root unit, which is gathered
once per step: a Q-Former block runs in up to four passes, and as units they would be gathered and reduced in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_SCALARS = "parameters_that_were_scalars"
"""Attribute of the module that owns them."""


def shard(root: nn.Module, mesh: DeviceMesh, *, step: str) -> None:
    """Shard `root`, in place, and everything in it; buffers stay whole.

    Args:
        root: holds the model, has been filled with its weights.
        mesh: of one dimension, all devices.
        step: name of the method of `root` inside which weights are whole: its training step.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # seconds that one device need not pay

    give_scalars_a_dimension(root)
    for block in repeated_blocks(root):
        fully_shard(block, mesh=mesh)
    for part in _parts(root):
        # what is outside the blocks; it stays until the backward pass has ended, whose begin a part need not notice: it
        # may return anything, while blocks return tensors
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
    fully_shard(root, mesh=mesh)
    register_fsdp_forward_method(root, step)


def give_scalars_a_dimension(root: nn.Module) -> None:
    """Make parameters without dimensions vectors of one element, in place: nothing else can be sharded.

    `scalar_names` remembers which. To be called before an optimizer knows them.
    """
    for module in root.modules():
        scalars = {name: item for name, item in module.named_parameters(recurse=False) if item.dim() == 0}
        for name, item in scalars.items():
            setattr(module, name, nn.Parameter(item.detach().view(1), item.requires_grad))
        if scalars:
            setattr(module, _SCALARS, frozenset(scalars))


def scalar_names(root: nn.Module) -> frozenset[str]:
    """Full names of the parameters that were scalars."""
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, module in root.named_modules()
        for name in getattr(module, _SCALARS, ())
    )


def whole_tensor(tensor: Tensor) -> Tensor:
    """Put a sharded tensor together, on the CPU; a collective. An unsharded one comes back as it is."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    whole: Tensor = tensor.full_tensor().cpu()
    return whole


def shard_like(whole: Tensor, sharded: Any) -> Tensor:
    """This rank's shard of a tensor that every rank holds whole, laid out as `sharded`; no communication."""
    from torch.distributed.tensor import distribute_tensor

    value = whole.to(sharded.device).reshape(sharded.shape)
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)


def repeated_blocks(root: nn.Module) -> Iterator[nn.Module]:
    """Blocks of the vision encoder and layers of the language model: the members of their lists of equal modules."""
    for part in _parts(root):
        for module in part.modules():
            if isinstance(module, nn.ModuleList) and len({type(member) for member in module}) == 1:
                yield from module


def _parts(root: nn.Module) -> list[nn.Module]:
    """The two backbones, where they are; each has a number format of its own, which a unit must not mix."""
    found = [module for name, module in root.named_modules() if name.endswith(("vision_encoder", "language_model"))]
    return [module for module in found if next(module.parameters(), None) is not None]
