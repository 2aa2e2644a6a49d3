"""Checks of the numbers that a config hands to an objective, before any step is computed.

Beside the arrow context -> loss; concerns no equation. LAVIS has these numbers as literals in its code.
"""

from __future__ import annotations

import math

from blip2train.errors import ConfigError


def check_weight(weight: float, objective: str) -> float:
    """Return the weight if it is a finite number of 0 or more, else raise a ConfigError."""
    if not (math.isfinite(weight) and weight >= 0):
        raise ConfigError(
            f"weight is {weight}", where=f"stage.objectives.{objective}.weight", fix="give 0 (off) or a positive number"
        )
    return weight


def check_label_smoothing(label_smoothing: float, objective: str) -> float:
    """Return the share if it lies in [0, 1), else raise a ConfigError."""
    if not 0 <= label_smoothing < 1:
        raise ConfigError(
            f"label_smoothing is {label_smoothing}",
            where="stage.objective.label_smoothing"
            if objective == "lm"
            else f"stage.objectives.{objective}.label_smoothing",
            fix="give a share from 0 to below 1; LAVIS uses 0.1 in stage 1 and none in stage 2",
        )
    return label_smoothing


def check_share(share: float, where: str) -> float:
    """Return the share if it lies in [0, 1], else raise a ConfigError."""
    if not 0 <= share <= 1:
        raise ConfigError(f"share is {share}", where=where, fix="give a number from 0 to 1")
    return share
