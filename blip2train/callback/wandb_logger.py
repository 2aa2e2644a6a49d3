"""Weights & Biases as one run per run folder: a resumed training continues the run it began, online and offline.

Lightning's logger makes a new run at every start. LAVIS has none.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir


class WandbRunLogger(WandbLogger):
    """The run's id lies in its folder (`RunDir.wandb_id_path`), wandb's step is the optimizer step.

    Online, wandb holds what was logged before; steps that are repeated after a resume are not logged twice. Offline it
    cannot look: every start writes a folder `wandb/offline-run-TIME-ID` of its own, which therefore begins with the
    rows of `metrics.jsonl` up to the resumed step. The newest one is the whole run, and all that has to be uploaded:
    `wandb sync RUN_DIR/wandb/latest-run`.

    Args:
        run_dir: the run folder.
        resume_step: optimizer step that training goes on from; at 0 a new id is drawn.
        offline: write files only, ask no server.
        options: of `wandb.init`: name, project, entity, group, tags, ...
    """

    def __init__(self, run_dir: str, *, resume_step: int, offline: bool = True, **options: Any) -> None:
        super().__init__(save_dir=run_dir, offline=offline, resume=None if offline else "allow", **options)
        self._wandb_init.pop("anonymous")  # Lightning passes what wandb no longer knows, and says so
        self._folder, self._resume_step = RunDir(Path(run_dir)), resume_step
        self._first_step = 0

    @property
    def experiment(self) -> Any:
        """The wandb run, made at the first look; a stand-in that does nothing on other ranks.

        Raises:
            ConfigError: wandb refuses, for want of a login or of its server.
        """
        if self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0:
            self._open()
        return super().experiment

    def _open(self) -> None:
        from wandb.errors import Error

        path = self._folder.wandb_id_path
        path.parent.mkdir(parents=True, exist_ok=True)  # else wandb writes to the system's temporary folder
        known = path.read_text(encoding="utf-8").strip() if self._resume_step and path.is_file() else ""
        self._wandb_init["id"] = self._id = known or secrets.token_hex(4)
        try:
            run = super().experiment
        except Error as error:
            raise ConfigError(
                f"wandb: {error}",
                where="logger.wandb",
                fix="`wandb login`, or logger.wandb.offline=true and sync later",
            ) from error
        path.write_text(f"{self._id}\n", encoding="utf-8")
        self._first_step = run.step
        if run.offline:
            self._repeat()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        run = self.experiment
        if step is None or step >= self._first_step:  # what comes before, a resumed run repeats: wandb has it
            # without commit a row waits for the next one, and a kill would take it
            run.log({**metrics, "trainer/global_step": step}, step=step, commit=True)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run, so that the next training of this process opens its own."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None

    def _repeat(self) -> None:
        for row in self._folder.read_metrics():
            if 0 < row["step"] <= self._resume_step:
                self.log_metrics({name: value for name, value in row.items() if name != "step"}, step=row["step"])
