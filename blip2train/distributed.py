"""The only door to `torch.distributed`: every function is the identity on one process.

Maths stays free of ranks: gather first, then call a pure function. LAVIS calls `dist.get_rank()` inside the loss and so
cannot run, or be tested, without a process group.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather as all_gather_with_grad

_pretended_ranks = 1
_LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


@contextlib.contextmanager
def pretend_world(ranks: int) -> Iterator[None]:
    """Under `with`, one process takes itself for rank 0 of many that all bring what it brings.

    For memory estimates: gathered tensors have their true size, nothing is sent. Not for training.
    """
    global _pretended_ranks
    before, _pretended_ranks = _pretended_ranks, ranks
    try:
        yield
    finally:
        _pretended_ranks = before


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else _pretended_ranks


def launched_as() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine) as torchrun or srun states them; (0, 1, 0) without either.

    For tools whose processes share files and nothing else: they need no process group.
    """
    for names in _LAUNCHERS:
        stated = [os.environ.get(name) for name in names]
        if all(stated):
            rank, world, local_rank = (int(value) for value in stated if value)
            return rank, world, local_rank
    return 0, 1, 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def gather(local: Tensor, *, with_grad: bool = False) -> Tensor:
    """Concatenate `local` (B, ...) over ranks into (G, ...), in rank order.

    Every rank must bring the same shape. With `with_grad` the gradient of every rank's loss flows back into `local`
    (summed), so that N ranks under DDP's mean give the gradient of one rank with the whole batch, provided that each
    rank's loss is the mean over its own rows. Without it the whole result is detached, the local block included, as in
    LAVIS.
    """
    if world_size() == 1:
        return local if with_grad else local.detach()
    if not is_distributed():
        own = local if with_grad else local.detach()
        return torch.cat([own.clone() for _ in range(world_size())])  # copies, as received from the other ranks
    if with_grad:
        return torch.cat(list(all_gather_with_grad(local.contiguous())), dim=0)  # type: ignore[no-untyped-call]
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.detach().contiguous())
    return torch.cat(parts, dim=0)


def gather_padded(local: Tensor, *, dim: int, value: float | int | bool) -> Tensor:
    """Gather without gradient after padding dimension `dim` (not 0) with `value` to the longest over ranks."""
    if world_size() == 1:
        return local.detach()
    if not is_distributed():
        return gather(local)
    length = torch.tensor([local.shape[dim]], device=local.device)
    longest = int(gather(length).max())
    if longest > local.shape[dim]:
        shape = list(local.shape)
        shape[dim] = longest - local.shape[dim]
        local = torch.cat([local, local.new_full(shape, value)], dim=dim)
    return gather(local)


def gather_objects(local: list[Any]) -> list[Any]:
    """Concatenate Python lists over ranks, in rank order; sizes may differ."""
    if world_size() == 1:
        return local
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, local)
    return [item for part in parts for item in part]


def reduce_sum(value: Tensor) -> Tensor:
    """Sum of `value` over ranks, without gradient."""
    if world_size() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total
