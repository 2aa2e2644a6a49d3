"""A LAVIS `.pth` on disk <-> its state dict and what else it says, without running anything that is pickled in it.

LAVIS saves {model, optimizer, config, scaler, epoch or iters} and reads it with a full unpickler, which executes
whatever a file tells it to; here a file that holds more than tensors and plain values is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2train.checkpoint.converted import FREE_SPACE
from blip2train.checkpoint.io import disk_error
from blip2train.errors import CheckpointError
from blip2train.weight_files import unpickle

NOT_NEEDED = ("optimizer", "scaler")
"""What LAVIS keeps for its own resume; no other trainer can continue from it."""


@dataclass(slots=True)
class LavisFile:
    """A LAVIS file's content.

    Args:
        state: its "model".
        facts: plain values beside it: epoch or iters, config.
        left_behind: names of entries that are not read.
    """

    state: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    left_behind: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Optimizer steps, where LAVIS counted iterations; 0 where it counted epochs."""
        iters = self.facts.get("iters", 0)
        return iters if isinstance(iters, int) else 0


def find_lavis_file(source: Path) -> Path:
    """The file itself, or the one `.pth` of a folder.

    Raises:
        CheckpointError: none, or several to choose from.
    """
    if source.is_file():
        return source
    found = sorted(source.glob("*.pth"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"one .pth is needed, there are: {names}", where=str(source), fix="give source=FILE.pth")
    return found[0]


def read_lavis_file(path: Path) -> LavisFile:
    """Read a `.pth`; tensors stay on disk until they are used.

    Raises:
        CheckpointError: damaged, no state dict, or with pickled objects in it (whose code is not run).
    """
    content = unpickle(
        path,
        fix="ask its author for one saved with torch.save({'model': model.state_dict()}, FILE); only if you trust the "
        "author with this machine, make it from this one: torch.load(FILE, weights_only=False)['model']",
    )
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(name, str) for name in state):
        raise CheckpointError(
            "holds no state dict", where=str(path), fix="give a file that LAVIS saved: {'model': tensors by name, ...}"
        )
    beside = {} if state is content else {name: value for name, value in content.items() if name != "model"}
    facts = {name: value for name, value in beside.items() if name not in NOT_NEEDED and _is_plain(value)}
    return LavisFile(dict(state), facts, [name for name in beside if name not in facts])


def write_lavis_file(state: Mapping[str, Tensor], path: Path) -> None:
    """Write {"model": state} as LAVIS's own `load_checkpoint` reads it.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    try:
        torch.save({"model": dict(state)}, path)
    except (OSError, RuntimeError) as error:  # torch's archive writer reports a full disk as a RuntimeError
        raise disk_error(error, path.parent, FREE_SPACE) from error


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
