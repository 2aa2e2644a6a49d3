"""`resume` and a run folder -> the checkpoint that training goes on from, or none: decided before anything is built.

Plain Lightning is told a file by hand; LAVIS loads one without asking whether the run is the same.
"""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from blip2train.cli import check
from blip2train.cli.features import check_same_features
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir

log = logging.getLogger(__name__)


def checkpoint_to_resume(config: DictConfig, run: RunDir) -> Path | None:
    """The last checkpoint of this run folder, if it has one and `resume` allows it."""
    from blip2train.checkpoint.find import list_checkpoints
    from blip2train.checkpoint.io import TRAINER_STATE

    known = list_checkpoints(run)
    if not known:
        return None
    if config.resume == "never":
        raise ConfigError(
            f"the run folder already holds {known[-1].name}",
            where=f"run_dir={run.path}",
            fix="use another run_dir=, delete this one, or resume=auto to continue it",
        )
    check.check_same_run(config, OmegaConf.load(run.config_path), run)
    check_same_features(config, run)
    if not (known[-1] / TRAINER_STATE).exists():  # a folder under DeepSpeed
        raise ConfigError(
            f"{known[-1].name} has no trainer state, so it cannot be continued",
            where=str(run.path),
            fix="train with checkpoint.trainer_state=true, or start a new run with init_from= this folder",
        )
    log.info("resuming %s from %s", run.path, known[-1].name)
    return known[-1]


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps of a checkpoint folder, by its name; 0 without one."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
