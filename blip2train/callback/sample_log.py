"""Batches -> a log of their keys, for whoever wants to see that a resumed run repeats and loses nothing.

`blip2train show order` says what is to come; this says what was trained on, replacements included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from blip2train import distributed
from blip2train.run_dir import read_jsonl, write_jsonl


class SampleLog(pl.Callback):
    """Writes `samples-rankR.jsonl`: one line per batch of a rank, `{"batch": 1, "step": 1, "keys": [...]}`.

    Args:
        folder: usually the run's. Lines of batches that a resumed run is about to repeat are taken out.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if distributed.is_main():  # the earlier run may have had more ranks
            for path in self._folder.glob("samples-rank*.jsonl"):
                rows = _whole_rows(path)
                write_jsonl(path, [row for row in rows if row["batch"] <= _num_batches(trainer)])
        distributed.barrier()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        row = {"batch": _num_batches(trainer), "step": trainer.global_step, "keys": batch.keys}
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"samples-rank{distributed.rank()}.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")


def _num_batches(trainer: pl.Trainer) -> int:
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(progress.processed)


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """All rows but a last one that a kill cut short."""
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    return read_jsonl(path)
