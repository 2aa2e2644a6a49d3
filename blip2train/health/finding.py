"""One thing that looks wrong in a training: what was seen, its likely cause, and where to look."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """A warning before it is said.

    Args:
        cause: short name; one cause is not said again at every step.
        seen: the figures.
        likely: what most often is behind them.
        look: the setting to turn or the file to look at.
    """

    cause: str
    seen: str
    likely: str
    look: str

    def __str__(self) -> str:
        return f"{self.seen}\n  likely: {self.likely}\n  look:   {self.look}"
