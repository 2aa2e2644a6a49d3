"""Steps whose loss jumps -> a warning with the step, the size, the rank and the keys of its batch."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

import pytorch_lightning as pl

from blip2train import distributed
from blip2train.callback.bad_step import Step
from blip2train.callback.warning_log import WarningLog
from blip2train.health.finding import Finding
from blip2train.health.spike import WINDOW, Spike, SpikeDetector

_MOST_KEYS = 256
_ONE_RANK = 0.5
"""A rank brought the spike where its loss exceeds the median rank's by this share of the jump times the ranks."""


class SpikeWatch:
    """Looks at every step that is taken; to be called on all ranks with the same loss.

    Args:
        warnings: where spikes are said.
        size: see `SpikeDetector`.
    """

    def __init__(self, warnings: WarningLog, size: float) -> None:
        self._warnings, self._detector = warnings, SpikeDetector(size)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def look(self, trainer: pl.Trainer, step: Step) -> None:
        """Judge one step; the ranks talk to each other only about a spike."""
        spike = self._detector.add(step.loss)
        usual_norm = median(self._norms) if self._norms else 0.0
        self._norms.append(step.norm)
        if spike is None:
            return
        keys = [key for _, batch in step.batches for key in batch.keys]
        local = {"rank": distributed.rank(), "loss": sum(loss.item() for loss in step.losses), "keys": keys}
        ranks: list[dict[str, Any]] = distributed.gather_objects([local])
        worst = max(ranks, key=lambda facts: float(facts["loss"]))
        self._warnings.say_always(
            step.number,
            _describe(spike, step, usual_norm, ranks, trainer),
            loss=spike.loss,
            usual=spike.usual,
            size=spike.size,
            rank=worst["rank"],
            keys=worst["keys"][:_MOST_KEYS],
        )

    def state_dict(self) -> dict[str, Any]:
        return {"detector": self._detector.state_dict(), "norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._detector.load_state_dict(state["detector"])
        self._norms = deque(state["norms"], maxlen=WINDOW)


def _describe(spike: Spike, step: Step, usual_norm: float, ranks: list[dict[str, Any]], trainer: pl.Trainer) -> Finding:
    rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)
    seen = (
        f"the loss is {spike.loss:.4g}, {spike.size:.0f} deviations above its usual {spike.usual:.4g}; gradient norm "
        f"{step.norm:.3g} (usually {usual_norm:.3g}), learning rate {rate:.3g}"
    )
    if spike.lasting:
        return Finding(
            "loss_stays_up",
            seen,
            "training has diverged and does not come back by itself",
            "continue from a checkpoint before the spike (resume=PATH) with a lower optim.lr, or with "
            "trainer.gradient_clip_val set",
        )
    guilty = _guilty_rank(spike, ranks)
    if guilty is not None:
        likely = f"the batch of rank {guilty}: its loss alone is high, so look at its keys first"
    elif trainer.gradient_clip_val is None and step.norm > 10 * usual_norm > 0:
        likely = "one huge gradient, which nothing clips, or an odd batch"
    else:
        likely = "an odd batch, or an optimizer step before this one that went too far (learning rate too high)"
    return Finding(
        "loss_spike", seen, likely, "the keys of this step in warnings.jsonl, gradient_norm around it, optim.lr"
    )


def _guilty_rank(spike: Spike, ranks: list[dict[str, Any]]) -> int | None:
    """The rank without which there would be no spike; None on one process, or where several are high."""
    if len(ranks) == 1:
        return None
    ordered = sorted(ranks, key=lambda facts: float(facts["loss"]))
    jump = (spike.loss - spike.usual) * len(ranks)
    above = ordered[-1]["loss"] - median(facts["loss"] for facts in ordered[:-1])
    guilty = math.isfinite(above) and above > _ONE_RANK * jump
    return int(ordered[-1]["rank"]) if guilty else None
