"""`resume` and a run folder -> the checkpoint that training goes on from, or none: decided before anything is built.

Deciding reads only, as every rank does it; what changes files waits for `ResumePoint.settle`, once all ranks have read.
Plain Lightning is told a file by hand; LAVIS loads one without asking whether the run is the same.
"""

from __future__ import annotations

import difflib
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from blip2train.cli import check
from blip2train.cli.config import resolved_yaml
from blip2train.cli.features import check_same_features
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir, write_json, write_text

log = logging.getLogger(__name__)

AUTO, NEVER = "auto", "never"
CONTINUED_FROM = "continued_from"


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A checkpoint that is whole and that a run may go on from.

    Args:
        checkpoint: its folder, with the trainer's state in it.
        run: the run folder that goes on.
        source: the run folder that it lies in: the same, or the one that `run` is a continuation of.
        config: of the continuation, as text.
        asked: the path that was asked for; None with resume=auto.
        newer: checkpoints after it, which are no part of what comes now.
    """

    checkpoint: Path
    run: RunDir
    source: RunDir
    config: str
    asked: Path | None
    newer: tuple[Path, ...]

    @property
    def step(self) -> int:
        """Optimizer steps of the checkpoint."""
        from blip2train.checkpoint.find import step_of

        return step_of(self.checkpoint)

    @property
    def trainer_state(self) -> Path:
        from blip2train.checkpoint.verify import TRAINER_STATE

        return self.checkpoint / TRAINER_STATE

    def settle(self) -> None:
        """Make the run folder what it was at this checkpoint; a kill half-way is settled by the next start.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        from blip2train.checkpoint.io import disk_error

        try:
            if self.source.path != self.run.path:
                self._adopt()
            elif self.newer:
                self._set_aside()
        except OSError as error:
            raise disk_error(error, self.run.path) from error

    def _set_aside(self) -> None:
        name = "damaged" if self.asked is None else "superseded"
        number = 1
        while (folder := self.run.checkpoints / f"{name}-{number}").exists():
            number += 1
        folder.mkdir()
        if self.run.metrics_path.is_file():  # its rows after this step are about to be taken out
            shutil.copy2(self.run.metrics_path, folder)
        for checkpoint in reversed(self.newer):  # so that a kill half-way leaves no newer one behind a gap
            checkpoint.rename(folder / checkpoint.name)
        log.warning("%s moved to %s", ", ".join(path.name for path in self.newer), folder)
        self._note()

    def _adopt(self) -> None:
        """Take over the other run's record and checkpoint: from then on this folder resumes by itself."""
        from blip2train.checkpoint.find import list_checkpoints, rank_by_metric

        best = rank_by_metric([path for path in list_checkpoints(self.source) if path not in self.newer])[:1]
        self.run.path.mkdir(parents=True, exist_ok=True)
        for path in (self.source.metrics_path, self.source.dropped_path, self.source.init_path):
            if path.is_file():
                shutil.copy2(path, self.run.path)
        self._trim_dropped()
        write_text(self.run.config_path, self.config)
        self._note()
        for checkpoint in [*best, self.checkpoint]:  # its own last: with it the folder is a run to be resumed
            self._copy(checkpoint)

    def _copy(self, checkpoint: Path) -> None:
        from blip2train.checkpoint.publish import partial_of, publish

        final = self.run.checkpoints / checkpoint.name
        if not final.exists():
            shutil.rmtree(partial_of(final), ignore_errors=True)
            shutil.copytree(checkpoint, partial_of(final), copy_function=_link_or_copy)
            publish(final)

    def _trim_dropped(self) -> None:
        from blip2train.checkpoint.io import read_metadata
        from blip2train.data.drop import DropLedger

        samples = read_metadata(self.checkpoint).get("samples")
        DropLedger([], log=self.run.dropped_path).load({}, samples)

    def _note(self) -> None:
        """Tell the next start that this was done, should a launcher repeat the command."""
        if self.asked is not None:
            when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            note = {"path": str(self.asked), "checkpoint": self.checkpoint.name, "when": when}
            write_json(self.run.manifest_path, self.source.read_manifest() | {CONTINUED_FROM: note})


def find_resume_point(config: DictConfig, run: RunDir) -> ResumePoint | None:
    """Where a training goes on: in its own folder, at a path that `resume` names, or nowhere.

    The very command that named a path goes on from the run's own last checkpoint once there are newer ones, so that a
    launcher may repeat it.

    Raises:
        ConfigError: the path is no run or checkpoint, the run is another one, or `run` may not be continued.
        CheckpointError: the checkpoint that was named is damaged, or none of the run is whole.
    """
    from blip2train.checkpoint.find import LAST, find_checkpoint, list_checkpoints, step_of

    own = list_checkpoints(run)
    asked, source, name = None, run, LAST
    if config.resume == NEVER and own:
        raise ConfigError(
            f"the run folder already holds {own[-1].name}",
            where=f"run_dir={run.path}",
            fix="use another run_dir=, delete this one, or resume=auto to continue it",
        )
    if config.resume not in (AUTO, NEVER):
        asked, source, name = _read_path(str(config.resume), run)
        noted = _noted(run, asked)
        if own and noted is not None and step_of(own[-1]) >= step_of(Path(noted)):
            log.info("resume=%s was done before: this run goes on from its own last checkpoint", config.resume)
            asked, source, name = None, run, LAST
        elif source.path != run.path:
            _check_may_take_over(RunDir.open(source.path, where="resume="), run, own if noted is None else [])
        elif name == LAST:
            asked = None  # its own folder: what resume=auto does
    if asked is None and not own and config.resume in (AUTO, NEVER):
        return None
    checkpoint = find_checkpoint(source, name, files=None)
    newer = tuple(path for path in list_checkpoints(source) if step_of(path) > step_of(checkpoint))
    point = ResumePoint(checkpoint, run, source, resolved_yaml(config), asked, newer)
    _check_may_go_on(config, point)
    log.info("resuming %s from %s", run.path, checkpoint.name if source is run else checkpoint)
    return point


def _check_may_take_over(source: RunDir, run: RunDir, own: list[Path]) -> None:
    if own:
        raise ConfigError(
            f"the run folder already holds {own[-1].name}, and is no continuation of {source.path}",
            where=f"run_dir={run.path}",
            fix="give a new run_dir= to continue the other run in, or resume=auto to continue this one",
        )


def _read_path(given: str, run: RunDir) -> tuple[Path, RunDir, str]:
    """(absolute path, run folder, name of the checkpoint or "last") of what `resume` names."""
    from blip2train.checkpoint.find import LAST, is_checkpoint_name

    path = Path(given)
    if is_checkpoint_name(given) and not path.exists():
        path = run.checkpoints / given
    path = path.absolute()
    if path.is_dir() and is_checkpoint_name(path.name):
        source, name = RunDir(path.parent.parent), path.name
        if source.checkpoints != path.parent:
            raise _out_of_place(path)
    elif path.is_dir():
        source, name = RunDir(path), LAST
    else:
        raise _no_such_path(given, path, run)
    return path, run if source.path.resolve() == run.path.resolve() else source, name


def _out_of_place(path: Path) -> ConfigError:
    homes = [folder for folder in path.parents if folder.name == RunDir(folder.parent).checkpoints.name]
    home = homes[0] if homes else "the checkpoints/ of its run"
    return ConfigError(
        f"{path.name} lies in {path.parent}, apart from its run",
        where="resume",
        fix=f"move it to {home}, where no {path.name} may be, and give that path",
    )


def _no_such_path(given: str, path: Path, run: RunDir) -> ConfigError:
    from blip2train.checkpoint.find import list_checkpoints

    siblings = [str(found) for found in path.parent.iterdir() if found.is_dir()] if path.parent.is_dir() else []
    words = difflib.get_close_matches(given, (AUTO, NEVER), n=1)
    close = words or difflib.get_close_matches(str(path), siblings, n=1)
    known = ", ".join(found.name for found in list_checkpoints(run))
    return ConfigError(
        f"{given!r} is a file" if path.is_file() else f"there is no {given!r}",
        where="resume",
        fix='use "auto", "never", or the path of a run folder or of a checkpoint folder in one'
        + (f"; this run has {known}" if known else "")
        + (f". Did you mean {close[0]}?" if close else ""),
    )


def _noted(run: RunDir, asked: Path) -> str | None:
    """The checkpoint from which this run has gone on before when the same path was asked for."""
    note = run.read_manifest().get(CONTINUED_FROM) or {}
    return str(note["checkpoint"]) if note.get("path") == str(asked) else None


def _check_may_go_on(config: DictConfig, point: ResumePoint) -> None:
    source = RunDir.open(point.source.path, where=f"run_dir={point.run.path}, resume={config.resume}")
    if not point.trainer_state.is_file():
        raise ConfigError(
            f"{point.checkpoint.name} has no trainer state, so it cannot be continued",
            where=str(source.path),
            fix="train with checkpoint.trainer_state=true, or start a new run with init_from= this folder",
        )
    check.check_same_run(config, OmegaConf.load(source.config_path), source)
    check_same_features(config, source)


def _link_or_copy(source: str, target: str) -> None:
    """The same bytes under a second name where the filesystem can: checkpoints are never written to again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
