"""`blip2train train`: config -> datamodule, module, callbacks, trainer -> run folder."""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from blip2train.callback.stop_signal import StopSignal
from blip2train.cli import check
from blip2train.cli.config import build, quiet_libraries, require_filled, resolved_yaml, run_verb, stop
from blip2train.cli.evaluate import load_run_config
from blip2train.cli.features import describe_features, with_features
from blip2train.cli.guard import Guard
from blip2train.cli.health import build_health
from blip2train.cli.launch import check_launcher, check_sweep, check_torchrun
from blip2train.cli.log_file import outlive_full_disk, speak_once
from blip2train.cli.resume import ResumePoint, find_resume_point
from blip2train.cli.run_log import build_loggers, build_watchers, chance_levels
from blip2train.errors import Blip2TrainError, ConfigError
from blip2train.run_dir import RunDir, read_json, write_json, write_text

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from blip2train.cli.initial_weights import InitialWeights
    from blip2train.data.datamodule import BlipDataModule
    from blip2train.stage.common import WeightLoader

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainOutcome:
    """How a training ended.

    Args:
        run: its folder.
        step: the last optimizer step.
        stopped_by: the signal that was heard, also one that came after the last step.
        exit_code: for the process, see `blip2train.exit_code`.
    """

    run: RunDir
    step: int
    stopped_by: str | None
    exit_code: int


def main() -> None:
    try:
        check_launcher(sys.argv[1:])
    except ConfigError as error:
        stop(error)
    run_verb("train", run)


def run(config: DictConfig) -> None:
    check_torchrun(os.environ)
    outlive_full_disk()
    speak_once()
    folder = RunDir(Path(HydraConfig.get().runtime.output_dir))
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        check_sweep(config)
        config.run_dir = str(folder.path)  # Hydra numbers a sweep's folders, and loggers write where this says
    outcome = train(config, folder)
    if outcome.exit_code:
        log.info("stopped by %s after step %d; the same command continues", outcome.stopped_by, outcome.step)
        raise SystemExit(outcome.exit_code)
    log.info("done: %s\n  next: blip2train evaluate run=%s   then: blip2train report run=%s", *(folder.path,) * 3)


def train(config: DictConfig, run: RunDir) -> TrainOutcome:
    """Train what `config` describes into `run`; continues an unfinished run there when `resume` is "auto".

    Raises:
        ConfigError, DataError, CheckpointError: see each; all but disk and data faults come before the first step.
    """
    with StopSignal() as stop:
        require_filled(config)
        check.check_train(config)
        adopt_vision_encoder(config)
        built = with_features(config)
        with Guard(config, run, stop) as guard:
            return _train(config, built, run, guard)


def _train(config: DictConfig, built: DictConfig, run: RunDir, guard: Guard) -> TrainOutcome:
    import pytorch_lightning as pl
    import torch

    from blip2train.cli.initial_weights import InitialWeights
    from blip2train.data.drop import summary

    quiet_libraries()  # after Lightning's import, which sets its own log level
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    point = find_resume_point(config, run)
    step = point.step if point else 0
    pl.seed_everything(config.seed, verbose=False)
    datamodule = build(built.data)
    tokenizer = datamodule.collator.tokenizer
    weights = InitialWeights(
        built, point.checkpoint if point else None, tokenizer.words if check.stage_number(config) == 1 else ()
    )
    module = build_module(built, weights)
    start = None if point else _Start(config, built, run, weights, datamodule)
    finite, health = build_health(config.health, run)
    metrics, progress, clock = build_watchers(config, built, datamodule, finite, health)
    trainer = _build_trainer(
        config, run, [finite, health, metrics, progress], guard, last=clock, start=start, point=point
    )
    started = time.perf_counter()
    try:
        trainer.fit(
            module,
            datamodule=datamodule,
            ckpt_path=str(point.trainer_state) if point else None,
            weights_only=True,
        )
    except Blip2TrainError:
        never = trainer.global_step == 0 and not run.bad_steps.exists()  # whose batches the config explains
        if start is not None and trainer.is_global_zero and never:
            start.withdraw()
        raise
    notes: dict[str, Any] = {"data": datamodule.counters()}  # of all ranks, so every rank is asked
    stopped_by, code = guard.stopped_by(finished=trainer.global_step >= config.trainer.max_steps)
    if trainer.is_global_zero and trainer.global_step > step:  # a finished run keeps its notes
        for line in summary(notes["data"]):
            log.warning("%s", line)
        notes["train_seconds"] = run.read_manifest().get("train_seconds", 0.0) + time.perf_counter() - started
        _note_outcome(run, trainer, notes, stopped_by)
    if code:
        guard.leave_together()
    return TrainOutcome(run, trainer.global_step, stopped_by or guard.heard, code)


def adopt_vision_encoder(config: DictConfig) -> None:
    """Where the run of `init_from` read its encoder from a file and this config names none, take that file.

    A converted model brings the encoder it was trained with; the one that timm downloads may be another.
    """
    if config.init_from in (None, "scratch"):
        return
    before = load_run_config(RunDir.open(config.init_from, where="init_from=")).model.vision_encoder
    own = config.model.vision_encoder
    if not before.get("weights") or own.get("weights"):
        return
    own.weights, own.pretrained = str(Path(before.weights).absolute()), False
    log.info("vision encoder: %s, as in the run of init_from", own.weights)


def build_module(config: DictConfig, load: WeightLoader | None) -> pl.LightningModule:
    """The LightningModule of a config; its model is built later, inside Lightning's `configure_model`."""
    module: pl.LightningModule = build(
        config.stage,
        build_model=functools.partial(build, config.model),
        build_optim=build(config.optim),
        seed=config.seed,
        load_weights=load,
    )
    return module


def _build_trainer(
    config: DictConfig,
    run: RunDir,
    callbacks: list[pl.Callback],
    guard: Guard,
    *,
    last: pl.Callback,
    start: _Start | None,
    point: ResumePoint | None,
) -> pl.Trainer:
    from blip2train.callback.checkpoint import CheckpointCallback
    from blip2train.callback.provenance import ProvenanceCallback

    stage = check.stage_number(config)
    callbacks = [
        *callbacks,
        *build(config.get("callback") or {}).values(),
        CheckpointCallback(
            run,
            metadata={"stage": stage, "name": config.name},
            resumed=point.checkpoint if point else None,
            settle=point.settle if point else None,
            **config.checkpoint,
        ),
    ]
    if start is not None:  # a resumed run keeps the record of how it once began
        callbacks.append(ProvenanceCallback(start.write))  # last: whatever refuses the start comes before it
    trainer: pl.Trainer = build(
        config.trainer,
        callbacks=guard.callbacks([*callbacks, last]),
        logger=build_loggers(config, run, point.step if point else 0),
        default_root_dir=str(run.path),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=config.log_every_steps,
        num_sanity_val_steps=0,
        max_epochs=-1,
    )
    guard.attach(trainer)
    return trainer


class _Start:
    """The record of a new run: gathered before anything is built, written once the model stands.

    Raises:
        DataError, ConfigError: shards that do not exist, or that the shipped backbones do not know.
    """

    def __init__(
        self, config: DictConfig, built: DictConfig, run: RunDir, weights: InitialWeights, data: BlipDataModule
    ) -> None:
        from blip2train.callback.provenance import describe_run

        shards = [shard.url for of_dataset in data.mixture.shards for shard in of_dataset]
        check_shipped_backbones(built, shards)
        self._run, self._weights = run, weights
        self._config_text = resolved_yaml(config)
        self._facts = describe_run(seed=config.seed, command=sys.argv, shards=shards)
        self._facts |= describe_features(config)
        self._chance_levels = functools.partial(chance_levels, config, data)

    def write(self) -> None:
        """Make the folder a run: config.yaml, manifest.json, init.json."""
        init = self._weights.as_json()
        self._run.path.mkdir(parents=True, exist_ok=True)
        for stale in (self._run.dropped_path, self._run.data_report_path):  # of a run that never reached a checkpoint
            stale.unlink(missing_ok=True)
        write_text(self._run.config_path, self._config_text)
        self._facts["chance_levels"] = self._chance_levels()
        write_json(self._run.manifest_path, self._facts | {"init": {key: init[key] for key in ("sources", "counts")}})
        write_json(self._run.init_path, init)

    def withdraw(self) -> None:
        """A run that never made a step is no run: nothing is to evaluate it or to start from it."""
        for path in (self._run.config_path, self._run.manifest_path, self._run.init_path):
            path.unlink(missing_ok=True)


def check_shipped_backbones(config: DictConfig, shards: list[str]) -> None:
    """The shipped backbones only know the world they were made for."""
    from blip2train.microworld.backbone import ASSETS, check_backbones
    from blip2train.microworld.pack import MANIFEST

    if not str(config.model.vision_encoder.get("weights") or "").startswith(str(ASSETS)):
        return
    for folder in {Path(url).parent for url in shards}:
        if (folder / MANIFEST).is_file():
            check_backbones(read_json(folder / MANIFEST)["world_hash"])


def _note_outcome(run: RunDir, trainer: pl.Trainer, notes: dict[str, Any], stopped_by: str | None) -> None:
    from blip2train.model.freezing import count_parameters

    trainable, frozen = count_parameters(trainer.lightning_module.model)  # type: ignore[arg-type]
    facts = {"trainable_parameters": trainable, "frozen_parameters": frozen, "steps": trainer.global_step}
    write_json(run.manifest_path, run.read_manifest() | facts | notes | {"stopped_by": stopped_by})


if __name__ == "__main__":
    main()
