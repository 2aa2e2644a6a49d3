"""The logger that is always on: `metrics.jsonl` and `metrics.csv` in the run folder, a row per logged step.

The CSV says the same to programs that want a table: it is made from the JSONL wherever it has to be written anew. LAVIS
appends to one text file, and a resumed run repeats rows in it.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping
from io import StringIO
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from blip2train.run_dir import RunDir, append_text, write_jsonl, write_text

log = logging.getLogger(__name__)


class FileLogger(Logger):
    """Appends to `RunDir.metrics_path` and `RunDir.metrics_table_path`; on rank 0 only.

    Nothing is touched before the first entry: a run that is refused leaves the rows of the one it was to continue.
    Rows that a full disk refuses are kept until it takes them: a training does not end for them.

    Args:
        run: the run folder.
        resume_step: entries logged after this step belong to work that is repeated; they are removed, as is a last
            line that a kill has cut short.
    """

    def __init__(self, run: RunDir, *, resume_step: int = 0) -> None:
        super().__init__()
        self._run, self._resume_step = run, resume_step
        self._columns: list[str] | None = None
        self._waiting: list[dict[str, Any]] = []  # rows that no file has
        self._untold: list[dict[str, Any]] = []  # rows that the table does not have
        self._refused = False

    @property
    def name(self) -> str:
        return "files"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._waiting.append({"step": step} | {name: float(value) for name, value in metrics.items()})
        try:
            self._write()
            self._refused = False
        except OSError as error:
            if not self._refused:
                log.warning("%s cannot be written (%s): tried again at every entry", self._run.path, error.strerror)
            self._refused = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Try once more what was refused, and say what is lost."""
        try:
            self._write()
        except OSError:
            lost = len(self._waiting or self._untold)
            log.warning("%d rows of %s are lost: the disk did not take them", lost, self._run.metrics_path)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Hyper-parameters are already in config.yaml."""

    def _write(self) -> None:
        if not (self._waiting or self._untold):
            return
        if self._columns is None:
            self._columns = self._continue()
        if self._waiting:
            append_text(self._run.metrics_path, "".join(json.dumps(row) + "\n" for row in self._waiting))
            self._untold += self._waiting
            self._waiting = []
        new = [name for row in self._untold for name in row if name not in self._columns]
        if new:
            columns = [*self._columns, *dict.fromkeys(new)]
            self._write_table(columns)
            self._columns = columns
        else:
            append_text(self._run.metrics_table_path, _table(self._columns, self._untold, header=False))
        self._untold = []

    def _continue(self) -> list[str]:
        """Bring both files to the state of the resumed step; the columns so far."""
        kept = [row for row in self._run.read_metrics() if row["step"] <= self._resume_step]
        write_jsonl(self._run.metrics_path, kept)
        columns = list(dict.fromkeys(name for row in kept for name in row))
        if kept:
            self._write_table(columns)
        return columns

    def _write_table(self, columns: list[str]) -> None:
        write_text(self._run.metrics_table_path, _table(columns, self._run.read_metrics(), header=True))


def _table(columns: list[str], rows: list[dict[str, Any]], *, header: bool) -> str:
    """Rows as CSV; what a row lacks is an empty cell."""
    text = StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
