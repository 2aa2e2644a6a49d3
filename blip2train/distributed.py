"""The only door to `torch.distributed`: every function is the identity on one process.

Maths stays free of ranks: gather first, then call a pure function. LAVIS calls `dist.get_rank()` inside the loss and so
cannot run, or be tested, without a process group; its gather wants the same number of rows on every rank.

Rows travel as bytes: a backend need not know the number format. Collectives with a gradient communicate in the backward
pass too, so every rank must run it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_pretended_ranks: int | None = None
_received: Counter[str] = Counter()
_LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


@contextlib.contextmanager
def pretend_world(ranks: int) -> Iterator[None]:
    """Under `with`, one process takes itself for rank 0 of many that all bring what it brings.

    For memory estimates and for steps on fake tensors: gathered tensors have their true size, nothing is sent, also
    where there are other ranks. Not for training.
    """
    global _pretended_ranks
    before, _pretended_ranks = _pretended_ranks, ranks
    try:
        yield
    finally:
        _pretended_ranks = before


def is_distributed() -> bool:
    return _pretended_ranks is None and dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else _pretended_ranks or 1


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


def traffic() -> Mapping[str, int]:
    """Bytes of rows that this process has received from other ranks so far, by the label of the call.

    What the gradient sent back has the label with " (backward)" behind it.
    """
    return dict(_received)


def gather_numbers(*numbers: int, device: torch.device) -> list[tuple[int, ...]]:
    """Numbers of every rank, in rank order; the host waits for the device."""
    if world_size() == 1 or not is_distributed():
        return [numbers] * world_size()
    return [tuple(row) for row in gather(torch.tensor([numbers], device=device), label="numbers").tolist()]


def gather(
    local: Tensor, *, sizes: Sequence[int] | None = None, with_grad: bool = False, label: str = "rows"
) -> Tensor:
    """Concatenate `local` (B, ...) over ranks into (G, ...), in rank order.

    With `with_grad` the gradient of every rank's loss flows back into `local` (summed), so that N ranks under DDP's
    mean give the gradient of one rank with the whole batch, provided that the mean of the ranks' losses is the loss of
    the whole batch. Without it the whole result is detached, the local block included, as in LAVIS.

    Args:
        local: this rank's rows; all dimensions but the first are the same on every rank.
        sizes: rows of every rank, the same list everywhere; None: every rank brings as many.
        with_grad: whether the result carries gradients.
        label: of the bytes, in `traffic`.
    """
    if world_size() == 1:
        return local if with_grad else local.detach()
    if not is_distributed():
        own = local if with_grad else local.detach()
        return torch.cat([own.clone() for _ in range(world_size())])  # copies, as received from the other ranks
    sizes = [len(local)] * world_size() if sizes is None else sizes
    gathered: Tensor = _Gather.apply(local if with_grad else local.detach(), sizes, label)  # type: ignore[no-untyped-call]
    return gathered


def exchange_rows(
    local: Tensor, wanted: Tensor, sizes: Sequence[int], *, label: str = "exchanged rows"
) -> tuple[Tensor, Tensor]:
    """Fetch chosen rows of other ranks: each once, however often it is wanted; own rows do not travel.

    The gradient goes back the same way and adds up in the owner; where `local` needs none, nothing is sent back.

    Args:
        local: (B, ...), this rank's rows.
        wanted: (B,) int64, positions among the G rows of all ranks: as many as the rank has rows.
        sizes: rows of every rank.
        label: of the bytes, in `traffic`.

    Returns:
        The fetched rows (U, ...), and for each wanted row its position (B,) in the own rows followed by the fetched.
    """
    if world_size() == 1:
        return local[:0], wanted
    if not is_distributed():  # the most there can be: all from elsewhere, all different
        return local.clone(), torch.arange(len(local), 2 * len(local), device=local.device)
    asked_by = torch.split(gather(wanted, sizes=sizes, label="wanted rows").cpu(), list(sizes))
    edges = torch.tensor([0, *itertools.accumulate(sizes)])
    own, first, end = rank(), edges[rank()], edges[rank() + 1]
    missing = [_elsewhere(rows, edges[asker], edges[asker + 1]) for asker, rows in enumerate(asked_by)]
    to_send = [rows[(rows >= first) & (rows < end)] - first for rows in missing]
    received = torch.searchsorted(missing[own], edges).diff().tolist()
    here = asked_by[own] - first
    is_own = (here >= 0) & (here < len(local))
    position = torch.where(is_own, here, len(local) + torch.searchsorted(missing[own], asked_by[own]))
    rows_to_send = torch.cat(to_send).to(local.device)
    fetched: Tensor = _Exchange.apply(local, rows_to_send, [len(rows) for rows in to_send], received, label)  # type: ignore[no-untyped-call]
    return fetched, position.to(local.device)


def gather_objects(local: list[Any]) -> list[Any]:
    """Concatenate Python lists over ranks, in rank order; sizes may differ."""
    if world_size() == 1:
        return local
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, local)
    return [item for part in parts for item in part]


def reduce_sum(value: Tensor) -> Tensor:
    """Sum of `value` over ranks, without gradient."""
    if not is_distributed():
        return value.detach() * world_size()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def _elsewhere(wanted: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """Sorted, each once: the wanted rows outside [first, end)."""
    rows: Tensor = torch.unique(wanted[(wanted < first) | (wanted >= end)])
    return rows


class _Gather(torch.autograd.Function):
    """All-gather of rows; backward: each block's gradients go to its owner, who adds them in rank order."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: Sequence[int], label: str) -> Tensor:
        ctx.sizes, ctx.label = sizes, label
        missing = max(sizes) - len(local)  # a collective wants equal sizes
        padded = torch.cat([local, local.new_zeros(missing, *local.shape[1:])]) if missing else local
        everything = local.new_empty(len(sizes), *padded.shape)
        dist.all_gather_into_tensor(_as_bytes(everything), _as_bytes(padded))
        _received[label] += padded.nbytes * (len(sizes) - 1)
        if min(sizes) == max(sizes):
            return everything.flatten(0, 1)
        return torch.cat([block[:size] for block, size in zip(everything, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own = ctx.sizes[rank()]
        parts = _all_to_all(gradient, ctx.sizes, [own] * len(ctx.sizes), f"{ctx.label} (backward)")
        return parts.view(len(ctx.sizes), own, *parts.shape[1:]).sum(dim=0), None, None


class _Exchange(torch.autograd.Function):
    """All-to-all of chosen rows; the gradient takes the way back and is added to the rows that were sent."""

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, rows: Tensor, sent: Sequence[int], received: Sequence[int], label: str
    ) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape, ctx.sent, ctx.received, ctx.label = local.shape, sent, received, label
        return _all_to_all(local.index_select(0, rows), sent, received, label)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (rows,) = ctx.saved_tensors
        returned = _all_to_all(gradient, ctx.received, ctx.sent, f"{ctx.label} (backward)")
        return gradient.new_zeros(ctx.shape).index_add_(0, rows, returned), None, None, None, None


def _all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int], label: str) -> Tensor:
    """Send consecutive blocks of `rows`, one to each rank, and put what they send one below the other."""
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    width = rows[:1].nbytes if len(rows) else arrived[:1].nbytes
    dist.all_to_all_single(
        _as_bytes(arrived),
        _as_bytes(rows),
        [width * count for count in received],
        [width * count for count in sent],
    )
    _received[label] += width * (sum(received) - received[rank()])
    return arrived


def _as_bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().flatten().view(torch.uint8)
