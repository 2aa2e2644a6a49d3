"""The logger that is always on: `metrics.jsonl` in the run folder, one object per logged step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from blip2train.run_dir import RunDir, write_jsonl


class JsonlLogger(Logger):
    """Appends to `RunDir.metrics_path`.

    Args:
        run: the run folder.
        resume_step: entries logged after this step belong to work that is about to be repeated; they are removed.
    """

    def __init__(self, run: RunDir, *, resume_step: int = 0) -> None:
        super().__init__()
        self._run = run
        kept = [row for row in run.read_metrics() if row["step"] <= resume_step]
        if run.metrics_path.is_file():
            write_jsonl(run.metrics_path, kept)

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._run.path.mkdir(parents=True, exist_ok=True)
        row = {"step": step} | {name: float(value) for name, value in metrics.items()}
        with self._run.metrics_path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Hyper-parameters are already in config.yaml."""
