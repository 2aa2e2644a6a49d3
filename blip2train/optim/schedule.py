"""Linear warm-up and cosine decay: number of the update -> factor on the peak learning rate.

Section 3.4 of the paper (warm-up 2k, cosine). LAVIS decays in epochs (a staircase that never reaches its minimum) and
counts micro-batches; here one optimizer step is one step, and the last one runs at exactly the minimum.
"""

from __future__ import annotations

import math


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
