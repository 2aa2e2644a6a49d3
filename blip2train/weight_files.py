"""A weights file, or a folder of them, -> tensors by name: safetensors or pickles, one file or shards, no code run.

Not in the paper. Every file that a user hands in goes through here, so the same damage gets the same message
everywhere. LAVIS unpickles any file; transformers notices a missing shard once it has read the others.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from blip2train.errors import CheckpointError

SAFETENSORS = ".safetensors"
INDEX = ".index.json"
NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers takes the first that is there."""

SHOWN = 8
_WEIGHTS_UNDER = ("model", "state_dict")
_NAMES_CODE = re.compile(r"global|reduce|class|instance|build", re.IGNORECASE)
"""How torch's restricted unpickler says that it met code; what it says of garbage has none of these words."""

Finder: TypeAlias = Callable[[str], Path | None]
"""File name -> where it lies, or None: a folder's or a hub repository's."""


def in_folder(folder: Path) -> Finder:
    """Finds the files of a local folder."""
    return lambda name: folder / name if (folder / name).is_file() else None


def find_weights(find: Finder, *, where: str) -> list[Path]:
    """The files that a model's weights are in, all of them there and, as far as headers tell, whole. Reads no tensor.

    Args:
        find: of the folder or repository.
        where: its name, for errors.

    Raises:
        CheckpointError: no weights, a missing or damaged shard, or an index that does not describe its shards.
    """
    first = _first(find)
    if first is None:
        raise CheckpointError(f"no weights: none of {', '.join(NAMES)}", where=where, fix="fetch the whole model again")
    if not first.name.endswith(INDEX):
        if first.suffix == SAFETENSORS:
            _tensor_names(first)
        return [first]
    shards = _read_index(first)
    places = {name: find(name) for name in sorted(shards)}
    missing = [name for name, path in places.items() if path is None]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:SHOWN])}",
            where=str(first),
            fix="copy the missing files beside the others",
        )
    found = {name: path for name, path in places.items() if path is not None}
    for name, path in found.items():
        if path.suffix == SAFETENSORS:
            _check_shard(name, shards[name], _tensor_names(path), first)
    return list(found.values())


def read_weights(find: Finder, *, where: str) -> dict[str, Tensor]:
    """Read every tensor of a model's weights.

    Raises:
        CheckpointError: as `find_weights` and `read_tensors`.
    """
    state: dict[str, Tensor] = {}
    for path in find_weights(find, where=where):
        state |= read_tensors(path)
    first = _first(find)
    if first is not None and first.name.endswith(INDEX):  # pickled shards show their names only once they are read
        for name, wanted in _read_index(first).items():
            _check_shard(name, wanted, set(state), first)
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read one file: `.safetensors`, anything else as a pickled state dict, bare or under "model" or "state_dict".

    Raises:
        CheckpointError: unreadable, cut short, or with anything but tensors by name in it; no code of it was run.
    """
    if path.suffix == SAFETENSORS:
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise damaged(path, error) from error
    state = unpickle(path, fix="give a .safetensors file, or a state dict: torch.save(model.state_dict(), FILE)")
    if isinstance(state, dict):  # training scripts put the weights beside their own state
        state = next((state[key] for key in _WEIGHTS_UNDER if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(
            f"holds a {type(state).__name__} of more than tensors by name",
            where=str(path),
            fix="give a plain state dict: torch.save(model.state_dict(), FILE)",
        )
    return state


def unpickle(path: Path, *, fix: str) -> Any:
    """Read what `torch.save` wrote, tensors and plain values only; tensors stay on disk until they are used.

    Args:
        path: an archive, or a file of before torch 1.6.
        fix: advice for a file that holds more.

    Raises:
        CheckpointError: unreadable, or with code in it, which was not run.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # torch's own message is left out: it advises weights_only=False, which would run the code
        if not _NAMES_CODE.search(str(error)):
            raise CheckpointError(
                "not a readable weights file, or not all of it; no code of it was run",
                where=str(path),
                fix="copy or fetch it again, or save it with torch.save or as .safetensors",
            ) from error
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"a pickle that calls {asked[1]}" if asked else "a pickle with more than tensors and plain values in it"
        raise CheckpointError(f"{found}; no code of it was run", where=str(path), fix=fix) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> CheckpointError:
    """The error of a file that cannot be read to its end."""
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"not a readable weights file, or not all of it ({said})", where=str(path), fix="copy or fetch it again"
    )


def _first(find: Finder) -> Path | None:
    return next((found for found in map(find, NAMES) if found is not None), None)


def _read_index(index: Path) -> dict[str, set[str]]:
    """Shard file -> names of the tensors that the index places in it."""
    shards: dict[str, set[str]] = {}
    try:
        for tensor, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            shards.setdefault(name, set()).add(tensor)
        outside = [name for name in shards if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"not a shard index ({error!r})", where=str(index), fix="fetch the file again") from error
    if outside:  # an index names files beside it; anything else would read elsewhere
        raise CheckpointError(f"a shard outside its folder: {outside[0]}", where=str(index), fix="correct the index")
    return shards


def _check_shard(name: str, wanted: set[str], found: set[str], index: Path) -> None:
    absent = sorted(wanted - found)
    if absent:
        raise CheckpointError(
            f"{name} lacks {len(absent)} tensors that the index places in it: {', '.join(absent[:SHOWN])}",
            where=str(index),
            fix="the files are of different checkpoints; fetch them again, all from one",
        )


def _tensor_names(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error
