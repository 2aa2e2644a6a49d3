"""Linear warm-up and cosine decay: number of the update -> factor on the peak learning rate.

Section 3.4 of the paper (warm-up 2k, cosine). LAVIS decays in epochs and counts micro-batches: that rule is here too,
as `epoch_staircase`. In `warmup_cosine` one optimizer step is one step, and the last one runs at exactly the minimum.
"""

from __future__ import annotations

import math
from typing import Literal

from blip2train.errors import ConfigError

Schedule = Literal["cosine", "epoch_staircase"]


def check_schedule(schedule: str, *, steps_per_epoch: int | None, max_steps: int) -> None:
    """Imports no torch, so that a config is checked before anything is built.

    Raises:
        ConfigError: an unknown schedule, or epochs that do not fit it.
    """
    if schedule == "cosine":
        if steps_per_epoch is not None:
            raise ConfigError(
                f"steps_per_epoch is {steps_per_epoch}, but the schedule 'cosine' knows no epochs",
                where="optim.steps_per_epoch, optim.schedule",
                fix="set optim.steps_per_epoch=null, or optim.schedule=epoch_staircase",
            )
        return
    if schedule != "epoch_staircase":
        raise ConfigError(
            f"schedule is {schedule!r}", where="optim.schedule", fix='"cosine" (paper) or "epoch_staircase" (LAVIS)'
        )
    if steps_per_epoch is None or steps_per_epoch < 1 or max_steps % steps_per_epoch:
        raise ConfigError(
            f"max_steps is {max_steps} and steps_per_epoch is {steps_per_epoch}",
            where="optim.steps_per_epoch, trainer.max_steps",
            fix="give the updates of one epoch, 1 or more, and a whole number of epochs: LAVIS's rule counts them",
        )


def warmup_cosine(
    step: int, *, warmup_steps: int, max_steps: int, start_factor: float = 0.0, final_factor: float = 0.0
) -> float:
    """Factor on the peak learning rate for one update.

    The convention: `step` is the number of updates already done (what `LambdaLR` passes), so this factor belongs to
    update number step + 1 of `max_steps`. The line leaves `start_factor` before the first update, so none is wasted
    at rate 0; update `warmup_steps` runs at the peak, update `max_steps` and all later ones at `final_factor`.

    Args:
        step: updates done so far, from 0.
        warmup_steps: length of the linear part; 0 for none.
        max_steps: number of updates of the whole run, larger than `warmup_steps`.
        start_factor: where the warm-up line begins.
        final_factor: where the cosine ends.
    """
    update = step + 1
    if update <= warmup_steps:
        return start_factor + (1.0 - start_factor) * update / warmup_steps
    if update >= max_steps:
        return final_factor
    progress = (update - warmup_steps) / (max_steps - warmup_steps)
    return final_factor + (1.0 - final_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def epoch_staircase(
    step: int,
    *,
    warmup_steps: int,
    steps_per_epoch: int,
    num_epochs: int,
    start_factor: float = 0.0,
    final_factor: float = 0.0,
) -> float:
    """LAVIS's `linear_warmup_cosine_lr`: the factor for one update, after `step` updates (what `LambdaLR` passes).

    In the first epoch the line rises from `start_factor`, at which update 1 itself runs, to the peak and stays there.
    From the second epoch on the factor is constant within an epoch, on a cosine over epoch / num_epochs. Two things
    follow, both kept: the last epoch stays above `final_factor`, and a warm-up longer than the first epoch is cut off,
    with a jump to the cosine. LAVIS's own stage-1 config does that: 5000 warm-up steps, epochs of 867.

    Args:
        step: updates done so far, from 0.
        warmup_steps: length of the line; its part beyond the first epoch is never run.
        steps_per_epoch: updates of one epoch.
        num_epochs: epochs of the whole run.
        start_factor: where the warm-up line begins.
        final_factor: what the cosine would reach after the last epoch.
    """
    epoch = min(step // steps_per_epoch, num_epochs)
    if epoch == 0:
        return min(1.0, start_factor + (1.0 - start_factor) * step / max(warmup_steps, 1))
    return final_factor + (1.0 - final_factor) * 0.5 * (1.0 + math.cos(math.pi * epoch / num_epochs))
