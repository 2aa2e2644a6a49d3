"""Lightning's dump of a trainer -> one file, straight to its place; a failure is kept for all ranks to hear of.

Lightning's own writer holds a second copy in memory, writes it to the system's temporary folder, and raises on rank 0
while the other ranks wait at a barrier.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO


class TrainerStateFile(TorchCheckpointIO):
    """Writes the file and never raises for the disk's sake: `take_error` says how it went."""

    def __init__(self) -> None:
        super().__init__()
        self._error: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        self._error = None
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with Path(path).open("wb") as file:
                torch.save(checkpoint, file)
        except OSError as error:
            self._error = error
        except RuntimeError as error:  # the archive writer stumbles over the failed write and hides it
            if not isinstance(error.__context__, OSError):
                raise
            self._error = error.__context__

    def take_error(self) -> OSError | None:
        """What the last call on this rank failed with, once."""
        error, self._error = self._error, None
        return error
