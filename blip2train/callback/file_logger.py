"""The logger that is always on: `metrics.jsonl` and `metrics.csv` in the run folder, a row per logged step.

The CSV says the same to programs that want a table: it is made from the JSONL wherever it has to be written anew. LAVIS
appends to one text file, and a resumed run repeats rows in it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from io import StringIO
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from blip2train.run_dir import RunDir, write_jsonl, write_text


class FileLogger(Logger):
    """Appends to `RunDir.metrics_path` and `RunDir.metrics_table_path`; on rank 0 only.

    Nothing is touched before the first entry: a run that is refused leaves the rows of the one it was to continue.

    Args:
        run: the run folder.
        resume_step: entries logged after this step belong to work that is repeated; they are removed, as is a last
            line that a kill has cut short.
    """

    def __init__(self, run: RunDir, *, resume_step: int = 0) -> None:
        super().__init__()
        self._run, self._resume_step = run, resume_step
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        return "files"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._columns is None:
            self._columns = self._continue()
        row = {"step": step} | {name: float(value) for name, value in metrics.items()}
        with self._run.metrics_path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._write_table()
        else:
            with self._run.metrics_table_path.open("a", encoding="utf-8", newline="") as file:
                file.write(_table(self._columns, [row], header=False))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Hyper-parameters are already in config.yaml."""

    def _continue(self) -> list[str]:
        """Bring both files to the state of the resumed step; the columns so far."""
        kept = [row for row in self._run.read_metrics() if row["step"] <= self._resume_step]
        write_jsonl(self._run.metrics_path, kept)
        self._columns = list(dict.fromkeys(name for row in kept for name in row))
        if kept:
            self._write_table()
        return self._columns

    def _write_table(self) -> None:
        assert self._columns is not None
        write_text(self._run.metrics_table_path, _table(self._columns, self._run.read_metrics(), header=True))


def _table(columns: list[str], rows: list[dict[str, Any]], *, header: bool) -> str:
    """Rows as CSV; what a row lacks is an empty cell."""
    text = StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
