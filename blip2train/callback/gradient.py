"""Gradients of all shards and ranks -> one norm, computed once per optimizer step and shared by whoever asks."""

from __future__ import annotations

import weakref

import pytorch_lightning as pl
import torch
from torch import Tensor

_norms: weakref.WeakKeyDictionary[pl.Trainer, tuple[int, Tensor]] = weakref.WeakKeyDictionary()


def total_norm(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> Tensor | None:
    """L2 norm of the whole gradient before clipping, the same on every rank.

    To be called from `on_before_optimizer_step`, on all ranks: under sharding it is a collective. Who asks first
    computes it; later callers of the same step get that value even if the gradients were dropped or clipped since.

    Args:
        trainer: its strategy is asked first (`gradient_norm()`, where gradients do not lie in `Tensor.grad`).
        optimizer: whose parameters' gradients count.

    Returns:
        A tensor of no dimensions on the device of the gradients, not finite where any of them is not; None where the
        strategy cannot say. Without any gradient it is 0.
    """
    step = trainer.global_step
    known = _norms.get(trainer)
    if known is None or known[0] != step:
        norm = _norm(trainer, optimizer)
        if norm is None:  # not yet: DeepSpeed is asked after every micro-batch
            return None
        known = _norms[trainer] = (step, norm)
    return known[1]


def _norm(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> Tensor | None:
    asked = getattr(trainer.strategy, "gradient_norm", None)
    if asked is not None:
        said: Tensor | None = asked()
        return said
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    sharded = [gradient for gradient in gradients if hasattr(gradient, "full_tensor")]
    plain = [gradient for gradient in gradients if not hasattr(gradient, "full_tensor")]
    norms = [torch.nn.utils.get_total_norm(plain)] if plain else []
    if sharded:
        norms.append(torch.nn.utils.get_total_norm(sharded).full_tensor())  # type: ignore[attr-defined]
    if not norms:
        return torch.zeros((), device=trainer.strategy.root_device)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
