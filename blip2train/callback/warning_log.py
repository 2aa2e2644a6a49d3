"""Findings -> the log and `warnings.jsonl` of the run folder, each cause at most once per doubling of the step."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

from blip2train import distributed
from blip2train.health.finding import Finding
from blip2train.run_dir import RunDir, write_jsonl

log = logging.getLogger(__name__)


class WarningLog:
    """Says findings, on the main process, and keeps them for the report.

    Args:
        run: the run folder.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._last: dict[str, int] = {}

    def begin(self, step: int) -> None:
        """Take out the warnings of steps after `step`: they are about to be repeated."""
        if distributed.is_main() and self._run.warnings_path.is_file():
            kept = [row for row in self._run.read_warnings() if row["step"] <= step]
            write_jsonl(self._run.warnings_path, kept)

    def say(self, step: int, finding: Finding, **facts: Any) -> bool:
        """Warn, unless the same cause was said since half as many steps; returns whether it was said."""
        last = self._last.get(finding.cause)
        if last is not None and step < 2 * last:
            return False
        self._last[finding.cause] = max(step, 1)
        self.say_always(step, finding, **facts)
        return True

    def say_always(self, step: int, finding: Finding, **facts: Any) -> None:
        """Warn of an event that has its own step, like a spike; to be called on every rank or on the main one."""
        if not distributed.is_main():
            return
        log.warning("step %d: %s", step, finding)
        row = {"step": step} | dataclasses.asdict(finding) | facts
        try:
            self._run.path.mkdir(parents=True, exist_ok=True)
            with self._run.warnings_path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:  # a warning ends no training
            log.warning("%s could not be written: %s", self._run.warnings_path, error)

    def state_dict(self) -> dict[str, int]:
        return dict(self._last)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._last = dict(state)
