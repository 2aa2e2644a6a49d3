"""A folder of torch.distributed.checkpoint (FSDP2, and Lightning's ModelParallelStrategy) -> whole tensors.

Its .metadata says which tensor lies where in which rank's file; one process reads them all. PyTorch unpickles that
table, and the objects of an optimizer, with whatever they call; here the table may name PyTorch's own records only, and
nothing but tensors is read.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from blip2train.checkpoint.sharded import ShardedCheckpoint, listed, read_inert
from blip2train.errors import CheckpointError

METADATA = ".metadata"
FACTS = "meta.pt"
"""What Lightning puts beside it: everything but weights and optimizer state."""
ROOTS = ("state_dict.", "app.model.", "model.", "module.")
"""Where the weights lie in what was saved, by Lightning's Trainer, PyTorch's tutorial and Lightning's Fabric."""
_OTHERS = re.compile(r"(?:optimizer|optim|lr_scheduler|scheduler|scaler)\w*(?:\.|$)")
"""What a training keeps beside weights that lie under no root."""
_COPY = "copy the whole folder again from where it was written"
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}


def find_dcp(source: Path) -> Path | None:
    """The folder itself if it is one, None if not.

    Raises:
        CheckpointError: its table is missing.
    """
    if (source / METADATA).is_file():
        return source
    if any(source.glob("*.distcp")):
        raise CheckpointError(
            f"files of torch.distributed.checkpoint without {METADATA}, which is written last",
            where=str(source),
            fix=f"the save did not finish: take the checkpoint before it; or {_COPY}, hidden files too",
        )
    return None


def read_dcp(folder: Path) -> ShardedCheckpoint:
    """Put the weights together.

    Raises:
        CheckpointError: files are missing, damaged or cut short, or hold objects of other packages.
    """
    table = _read_table(folder / METADATA)
    _check_files(folder, table)
    entries = {name: entry for name, entry in table.state_dict_metadata.items() if _is_tensor(entry)}
    root = next((item for item in ROOTS if any(name.startswith(item) for name in entries)), "")
    chosen = {name: entry for name, entry in entries.items() if _is_weight(name, root)}
    if not chosen:
        raise CheckpointError(
            f"no weights in it, only {listed(sorted(table.state_dict_metadata)) or 'nothing'}",
            where=str(folder),
            fix="give the folder that holds the model",
        )
    _check_covered(chosen, folder)
    state = _load(table, chosen, folder)
    others = sorted({name.split(".")[0] for name in table.state_dict_metadata if name not in chosen})
    return ShardedCheckpoint(
        "torch.distributed.checkpoint",
        folder,
        {name.removeprefix(root): tensor for name, tensor in state.items()},
        len({path.split("_")[2] for path in _file_sizes(table)}),
        _step(folder / FACTS),
        others,
    )


class _Table(pickle.Unpickler):
    """Builds PyTorch's records and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        a_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        if not a_dtype and name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"calls {module}.{name}")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Takes the table that has been read."""

    def __init__(self, folder: Path, table: Metadata) -> None:
        super().__init__(folder)
        self._known = table

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._known


def _read_table(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            table = _Table(file).load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"not a table of torch.distributed.checkpoint ({error}); no code of it was run", where=str(path), fix=_COPY
        ) from error
    except Exception as error:  # a damaged pickle fails in as many ways as it can be damaged
        raise CheckpointError(f"damaged ({type(error).__name__}: {error})", where=str(path), fix=_COPY) from error
    if not isinstance(table, Metadata) or not isinstance(table.storage_data, dict):
        raise CheckpointError("not a table of torch.distributed.checkpoint", where=str(path), fix=_COPY)
    if getattr(table, "storage_meta", None) is None:
        table.storage_meta = StorageMeta()
    return table


def _file_sizes(table: Metadata) -> dict[str, int]:
    """File -> bytes that it has at least."""
    sizes: dict[str, int] = {}
    for place in table.storage_data.values():
        sizes[place.relative_path] = max(sizes.get(place.relative_path, 0), place.offset + place.length)
    return sizes


def _check_files(folder: Path, table: Metadata) -> None:
    sizes = _file_sizes(table)
    outside = [name for name in sizes if not re.fullmatch(r"__\d+_\d+\.distcp", name)]
    if outside:  # a table names files beside it; anything else would read elsewhere
        raise CheckpointError(
            f"{METADATA} names {outside[0]!r}, not a rank's file beside it", where=str(folder), fix=_COPY
        )
    missing = [name for name in sorted(sizes) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(sizes)} files are missing: {listed(missing)}",
            where=str(folder),
            fix=f"{_COPY}; each machine writes the files of its own ranks",
        )
    for name, wanted in sizes.items():
        found = (folder / name).stat().st_size
        if found < wanted:
            raise CheckpointError(
                f"{name} has {found} bytes, {METADATA} needs {wanted} of it",
                where=str(folder),
                fix=f"cut short, or of another checkpoint: {_COPY}",
            )


def _check_covered(entries: dict[str, Any], folder: Path) -> None:
    partial = [
        name
        for name, entry in entries.items()
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) < math.prod(entry.size)
    ]
    if partial:
        raise CheckpointError(
            f"{len(partial)} tensors are in it in part only: {listed(partial)}",
            where=str(folder),
            fix="a rank did not take part in saving: take another checkpoint",
        )


def _load(table: Metadata, entries: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(state, storage_reader=_Reader(folder, table), no_dist=True)
    except (CheckpointException, Exception) as error:  # PyTorch's wrapper is no Exception
        raise CheckpointError(
            f"the ranks' files cannot be read ({_cause(error)}); no code of them was run",
            where=str(folder),
            fix=f"damaged, or of another checkpoint: {_COPY}",
        ) from error
    return state


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, pickle.UnpicklingError):  # torch's own message advises to run the code
        return "more than tensors in them, or garbage"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, TensorStorageMetadata)


def _is_weight(name: str, root: str) -> bool:
    return name.startswith(root) if root else _OTHERS.match(name) is None


def _step(path: Path) -> int:
    """Optimizer steps by Lightning's facts; 0 where there are none."""
    if not path.is_file():
        return 0
    facts = read_inert(path, fix=f"delete {path.name}: nothing but the number of steps is read from it")
    step = facts.get("global_step", 0) if isinstance(facts, dict) else 0
    return step if isinstance(step, int) else 0
