"""Loss of every step -> the steps at which it jumps away from what it has been lately.

Median and median absolute deviation of the last steps: a spike does not raise the bar for the next one, as a running
mean and variance would let it. Pure Python on numbers that every rank has alike.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

WINDOW = 200
"""Steps whose losses are remembered."""

LEAST = 50
"""Steps before anything is judged: of a run's first ones, whose loss falls fast, none is normal yet."""

STUCK = 50
"""Steps above the bar after which a spike is called a divergence."""

_MAD_TO_DEVIATION = 1.4826
_LEAST_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Spike:
    """One step's `loss` against the `usual` one; `size` in robust deviations; `lasting` once it has stayed up."""

    loss: float
    usual: float
    size: float
    lasting: bool


class SpikeDetector:
    """Feed it one loss per optimizer step.

    Args:
        size: robust standard deviations above the median that make a spike; 0 finds none.
    """

    def __init__(self, size: float) -> None:
        self._size = size
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._above = 0

    def add(self, loss: float) -> Spike | None:
        """Judge a step against those before it; the first of a row of high steps is told, and the `STUCK`th."""
        if not self._size or not math.isfinite(loss):
            return None
        spike = self._judge(loss) if len(self._losses) >= LEAST else None
        self._losses.append(loss)
        return spike

    def _judge(self, loss: float) -> Spike | None:
        usual = median(self._losses)
        spread = _MAD_TO_DEVIATION * median(abs(value - usual) for value in self._losses)
        size = (loss - usual) / max(spread, _LEAST_SHARE * abs(usual), 1e-12)
        if size <= self._size:
            self._above = 0
            return None
        self._above += 1
        return Spike(loss, usual, size, self._above > 1) if self._above in (1, STUCK) else None

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "above": self._above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._above = state["above"]
