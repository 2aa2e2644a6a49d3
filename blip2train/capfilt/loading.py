"""Names of models -> weights on a device, with what identifies them; shared by captioners and rankers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from blip2train.errors import ConfigError

T = TypeVar("T")

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
_EDGE_BYTES = 1 << 20


def choose_dtype(name: str, device: torch.device, where: str) -> torch.dtype:
    """`auto` is float16 on a GPU and float32 elsewhere.

    Raises:
        ConfigError: no such precision.
    """
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in known:
        raise ConfigError(f"precision {name!r}", where=where, fix=f"auto, {', '.join(known)}")
    return known[name]


def load_part(load: Callable[[], T], model: str, where: str, kind: str) -> T:
    """Call a library's loader; what it cannot find or does not know becomes a `ConfigError`."""
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{model!r} cannot be loaded as {kind} ({reason})",
            where=where,
            fix="give a local folder with weights, config and processor, or a name on the hub (network once)",
        ) from error


def model_identity(
    model: str, dtype: str, device: torch.device, where: str, weights: str | None = None
) -> dict[str, Any]:
    """What the answers of a model depend on, found without loading it.

    Args:
        model: its name.
        dtype: as `choose_dtype` takes it, and the next two.
        device: where it is to run.
        where: config key of the precision.
        weights: their path, where it is not the name.
    """
    precision = str(choose_dtype(dtype, device, where)).removeprefix("torch.")
    return {"model": model, "weights": weights_digest(weights or model), "dtype": precision}


def weights_digest(path: str | Path) -> str | None:
    """What tells the weights of a local file or folder from others: names, sizes, first and last megabyte.

    None for a name on the hub.
    """
    found = Path(path).expanduser()
    if not found.exists():
        return None
    files = [found] if found.is_file() else sorted({file for kind in _WEIGHTS for file in found.glob(kind)})
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if found.is_dir() else ''}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_EDGE_BYTES))
            stream.seek(max(0, size - _EDGE_BYTES))
            digest.update(stream.read(_EDGE_BYTES))
    return digest.hexdigest()[:16]
