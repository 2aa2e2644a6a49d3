"""What a model that knows nothing scores: the horizontal lines of the report's learning curves.

Values of the losses of sections 3.2 and 3.3 of the paper under a constant prediction. Imports no torch, so that a
report can be drawn anywhere; LAVIS draws no such line.
"""

from __future__ import annotations

import math

from blip2train.errors import ConfigError

_OBJECTIVES = ("itc", "itm", "itg", "lm")


def chance_level(objective: str, *, batch_size: int = 0, vocab_size: int = 0) -> float:
    """Loss of the best constant prediction, in nats; label smoothing does not change it.

    Args:
        objective: "itc" (ln G), "itm" (entropy of one positive to two negatives), "itg" or "lm" (ln V).
        batch_size: pairs over all ranks, G; read by "itc".
        vocab_size: V; read by "itg" and "lm".

    Raises:
        ConfigError: unknown name, or the size it needs is missing.
    """
    if objective not in _OBJECTIVES:
        raise ConfigError(
            f"no chance level is known for {objective!r}", where="objective", fix=f"one of {', '.join(_OBJECTIVES)}"
        )
    if objective == "itm":
        return math.log(3) - 2 / 3 * math.log(2)
    name, size = ("batch_size", batch_size) if objective == "itc" else ("vocab_size", vocab_size)
    if size < 1:
        raise ConfigError(f"{name} is {size}", where=f"chance level of {objective}", fix=f"give {name}=")
    return math.log(size)
