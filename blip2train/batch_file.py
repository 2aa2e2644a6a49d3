"""A batch <-> a file that `torch.load(weights_only=True)` reads: of a step that went wrong, to be looked at again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2train.batch import Stage1Batch, Stage2Batch
from blip2train.errors import DataError

_KINDS = {kind.__name__: kind for kind in (Stage1Batch, Stage2Batch)}


def save_batch(batch: Stage1Batch | Stage2Batch, path: Path, **facts: Any) -> None:
    """Write a batch, copied to the CPU, with plain facts beside it (step, rank)."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    values = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"kind": type(batch).__name__, "values": values, "facts": facts}, path)


def load_batch(path: Path) -> tuple[Stage1Batch | Stage2Batch, dict[str, Any]]:
    """The batch, on the CPU, and the facts that were saved with it.

    Raises:
        DataError: there is no such file, or another kind of file.
    """
    try:
        saved = torch.load(path, weights_only=True)
        return _KINDS[saved["kind"]](**saved["values"]), saved["facts"]
    except Exception as error:  # other bytes, taken for a pickle, raise nearly anything
        raise DataError(
            f"no batch could be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
            where=str(path),
            fix="give a bad_steps/step-N/batch-rankR.pt of a run folder",
        ) from error
