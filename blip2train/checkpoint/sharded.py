"""What a checkpoint in shards is once it is put together, and how its pickles are read: no code of theirs is run.

Our own checkpoints are whole (strategy/whole.py). Folders of shards come from plain Lightning: DeepSpeed's
(checkpoint/sharded_deepspeed.py) and those of torch.distributed.checkpoint (checkpoint/sharded_dcp.py).
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from blip2train.errors import CheckpointError
from blip2train.weight_files import unpickle

SHOWN = 8

IN_FRONT = ("_forward_module.", "_orig_mod.", "module.", "model.")
"""What engines, compilers and Lightning modules put before a parameter's name; none of our names begins with them."""
INSIDE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What wrappers of single blocks put into it."""

_INERT = ("deepspeed", "pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "argparse", "pathlib")
"""Packages whose objects lie beside the weights in an honest checkpoint (loss scalers, hyperparameters, paths)."""
_NUMBERS: dict[str, Callable[..., Any]] = {"deepspeed.runtime.zero.config.ZeroStageEnum": int}


@dataclass(slots=True)
class ShardedCheckpoint:
    """A folder of shards, put together.

    Args:
        kind: what wrote it, for people.
        where: the folder that its files are in.
        state: whole tensors, by the names in the file.
        ranks: number of processes that wrote it.
        step: optimizer steps, 0 where the folder does not say.
        left_behind: what else it holds, which is not read.
    """

    kind: str
    where: Path
    state: dict[str, Tensor]
    ranks: int
    step: int = 0
    left_behind: list[str] = field(default_factory=list)


class Inert:
    """What a pickled object of another package is read as: it takes any arguments and state and does nothing."""

    def __new__(cls, *args: Any, **settings: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **settings: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def own_names(state: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """The same tensors under the model's own names.

    Raises:
        CheckpointError: two of them are one parameter's.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = own_name(name)
        if own in named and named[own] is not tensor:
            raise CheckpointError(
                f"{own} is in it twice, the second time as {name}",
                where=where,
                fix="give the folder of one model; its weights must lie there once",
            )
        named[own] = tensor
    return named


def own_name(name: str) -> str:
    """A parameter's name without what wrappers have put before and into it."""
    for wrapper in INSIDE:
        name = name.replace(wrapper, "")
    while front := next((item for item in IN_FRONT if name.startswith(item)), None):
        name = name.removeprefix(front)
    return name


def read_inert(path: Path, *, fix: str) -> Any:
    """Read what `torch.save` wrote; objects of other packages come as `Inert`, their code is not even imported.

    Args:
        path: the file.
        fix: advice for one that holds still other objects.

    Raises:
        CheckpointError: unreadable, or with such objects in it; no code of it was run.
    """
    with only_inert([path]):
        return unpickle(path, fix=fix)


@contextlib.contextmanager
def only_inert(files: Iterable[Path]) -> Iterator[None]:
    """Let torch's restricted reader pass over the harmless objects that these files name; others it refuses."""
    names = {name for path in files if zipfile.is_zipfile(path) for name in _globals_of(path)}
    known = [name for name in sorted(names) if name.split(".")[0] in _INERT]
    stand_ins: list[Any] = [(_NUMBERS.get(name, Inert), name) for name in known]
    with safe_globals(stand_ins):
        yield


def _globals_of(path: Path) -> list[str]:
    try:
        return get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, OSError, ValueError, KeyError, EOFError, IndexError):  # damaged: reading it says so
        return []


def listed(names: Iterable[str]) -> str:
    """A few of these names, and how many more there are."""
    every = list(names)
    more = len(every) - SHOWN
    return ", ".join(every[:SHOWN]) + (f" and {more} more" if more > 0 else "")
