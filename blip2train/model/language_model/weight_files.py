"""A folder of language-model weights -> complete or not, from file names and headers, before anything big is read.

Not in the paper. transformers notices a missing shard once it has read the others; LAVIS unpickles any file.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from blip2train.errors import CheckpointError

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_LOOKED_FOR = (_SINGLE[0], _INDEX[0], _SINGLE[1], _INDEX[1])
"""In the order in which transformers takes the first that is there."""


def check_weight_files(folder: Path) -> None:
    """Check that a local model folder has all the files its weights are in, and that safetensors headers are whole.

    Pickles are not opened here: transformers reads them with torch's weights-only unpickler.

    Raises:
        CheckpointError: no weights, a missing or damaged shard, or an index that does not describe its shards.
    """
    found = next((folder / name for name in _LOOKED_FOR if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            "a model folder without weights",
            where=str(folder),
            fix=f"it needs one of {', '.join(_LOOKED_FOR)}; weights=false builds random ones",
        )
    if found.name in _INDEX:
        _check_shards(found)
    elif found.suffix == ".safetensors":
        _tensor_names(found)


def _check_shards(index: Path) -> None:
    shards = _read_index(index)
    missing = sorted(name for name in shards if not (index.parent / name).is_file())
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:8])}",
            where=str(index),
            fix="copy the missing files beside the others",
        )
    for name, tensors in sorted(shards.items()):
        if not name.endswith(".safetensors"):
            continue
        absent = sorted(tensors - _tensor_names(index.parent / name))
        if absent:
            raise CheckpointError(
                f"{name} lacks {len(absent)} tensors that the index places in it: {', '.join(absent[:4])}",
                where=str(index),
                fix="the files are of different checkpoints; fetch them again, all from one",
            )


def _read_index(index: Path) -> dict[str, set[str]]:
    """Shard file -> names of the tensors that the index places in it."""
    shards: dict[str, set[str]] = {}
    try:
        for tensor, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            shards.setdefault(file, set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"not a shard index ({error!r})", where=str(index), fix="fetch the file again") from error
    return shards


def _tensor_names(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except SafetensorError as error:
        raise CheckpointError(
            f"not a whole safetensors file ({error})", where=str(file), fix="fetch the file again; it may be cut short"
        ) from error
