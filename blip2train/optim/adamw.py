"""Model -> AdamW and its schedule, with the settings of the paper's section 3.4.

beta2 is 0.98 as in the paper; LAVIS's default is 0.999. The schedule counts optimizer steps; LAVIS's, which counts
epochs, is an option.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from blip2train.errors import ConfigError
from blip2train.optim.param_group import NoDecay, group_parameters, summarize
from blip2train.optim.schedule import Schedule, check_schedule, epoch_staircase, warmup_cosine

_FUSED_DEVICES = {"cpu", "cuda"}

log = logging.getLogger(__name__)


def build_adamw(
    module: nn.Module,
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.98),
    weight_decay: float = 0.05,
    warmup_steps: int,
    max_steps: int,
    min_lr: float,
    no_decay: NoDecay = "paper",
    warmup_start_lr: float = 0.0,
    schedule: Schedule = "cosine",
    steps_per_epoch: int | None = None,
) -> tuple[AdamW, LambdaLR]:
    """Optimizer over what requires a gradient, and a scheduler to be stepped once per optimizer step.

    Args:
        module: the model, already on its device: the fused kernel is used where all parameters allow it.
        lr: peak learning rate, reached by update number `warmup_steps`.
        betas: decay of the two moments.
        weight_decay: decoupled, of the group "decay"; see `group_parameters` for `no_decay`.
        warmup_steps: length of the linear warm-up in optimizer steps.
        max_steps: optimizer steps of the whole run; under "cosine" the last one runs at exactly `min_lr`.
        min_lr: learning rate at the end.
        no_decay: which parameters are exempt from weight decay.
        warmup_start_lr: where the warm-up line begins, before the first update.
        schedule: "cosine" (paper), or "epoch_staircase" (LAVIS, see `optim.schedule`).
        steps_per_epoch: updates of one epoch; needed by "epoch_staircase" and by nothing else.

    Raises:
        ConfigError: the numbers contradict each other.
    """
    _check(lr, betas, weight_decay, warmup_steps, max_steps, min_lr, warmup_start_lr)
    factor = _build_factor(schedule, steps_per_epoch, warmup_steps, max_steps, warmup_start_lr / lr, min_lr / lr)
    groups = group_parameters(module, weight_decay, no_decay)
    log.info("AdamW groups (%s):\n%s", no_decay, summarize(groups))
    optimizer = AdamW(
        [group.to_optimizer() for group in groups],
        lr=lr,
        betas=(betas[0], betas[1]),
        fused=_fused([parameter for group in groups for _, parameter in group.parameters]),
    )
    # With True, Lightning refuses to clip gradients under any mixed precision, bfloat16 included, because a fused step
    # may unscale gradients itself. With False they are unscaled before clipping and the fused step gets them plain.
    optimizer._step_supports_amp_scaling = False
    return optimizer, LambdaLR(optimizer, factor)


def _build_factor(
    schedule: Schedule,
    steps_per_epoch: int | None,
    warmup_steps: int,
    max_steps: int,
    start_factor: float,
    final_factor: float,
) -> Callable[[int], float]:
    """Number of updates done -> factor on the peak rate."""
    check_schedule(schedule, steps_per_epoch=steps_per_epoch, max_steps=max_steps)
    if steps_per_epoch is None:
        return partial(
            warmup_cosine,
            warmup_steps=warmup_steps,
            max_steps=max_steps,
            start_factor=start_factor,
            final_factor=final_factor,
        )
    if warmup_steps > steps_per_epoch:
        log.warning(
            "the warm-up of %d steps is cut off after the first epoch, %d steps, and the rate jumps, as in LAVIS",
            warmup_steps,
            steps_per_epoch,
        )
    return partial(
        epoch_staircase,
        warmup_steps=warmup_steps,
        steps_per_epoch=steps_per_epoch,
        num_epochs=max_steps // steps_per_epoch,
        start_factor=start_factor,
        final_factor=final_factor,
    )


def _fused(parameters: list[nn.Parameter]) -> bool | None:
    """True where torch has the kernel (measured on CPU: 4.4 times the loop); None leaves the choice to torch."""
    fits = all(item.device.type in _FUSED_DEVICES and torch.is_floating_point(item) for item in parameters)
    return True if fits else None


def _check(
    lr: float,
    betas: Sequence[float],
    weight_decay: float,
    warmup_steps: int,
    max_steps: int,
    min_lr: float,
    warmup_start_lr: float,
) -> None:
    def refuse(found: str, where: str, fix: str) -> None:
        raise ConfigError(found, where=f"optim.{where}", fix=fix)

    if lr <= 0:
        refuse(f"lr is {lr}", "lr", "give a peak learning rate above 0")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        refuse(f"betas are {list(betas)}", "betas", "give two numbers in [0, 1), the paper's are 0.9 and 0.98")
    if weight_decay < 0:
        refuse(f"weight_decay is {weight_decay}", "weight_decay", "give 0 or more")
    if max_steps < 1:
        refuse(f"max_steps is {max_steps}", "max_steps", "set trainer.max_steps: the schedule needs an end")
    if not 0 <= warmup_steps < max_steps:
        refuse(
            f"warmup_steps is {warmup_steps} but the run has {max_steps} optimizer steps",
            "warmup_steps",
            f"give 0 to {max_steps - 1}, or train longer (trainer.max_steps)",
        )
    for name, value in (("min_lr", min_lr), ("warmup_start_lr", warmup_start_lr)):
        if not 0 <= value <= lr:
            refuse(f"{name} is {value} but the peak lr is {lr}", name, f"give a value between 0 and {lr}")
