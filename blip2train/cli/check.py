"""Checks across fields that composition cannot see; each fails before anything is read or built."""

from __future__ import annotations

import logging
import re
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from blip2train.cli.check_model import check_first_weights, check_precision
from blip2train.cli.health import check_health
from blip2train.data.sharing import batch_per_device, check_readers
from blip2train.errors import ConfigError
from blip2train.nested import differences
from blip2train.optim.schedule import check_schedule
from blip2train.run_dir import RunDir

log = logging.getLogger(__name__)

STAGES = {
    "blip2train.stage.stage1.Stage1Module": 1,
    "blip2train.stage.stage2.Stage2Module": 2,
}
MODELS = {
    "blip2train.model.blip2_stage1.Blip2Stage1": 1,
    "blip2train.model.blip2_stage2.Blip2Stage2": 2,
}
MAY_CHANGE_ON_RESUME = (
    *("trainer", "callback", "logger", "checkpoint", "paths", "benchmarks"),
    *("log_every_steps", "peak_tflops", "watchdog", "health"),
)
"""Parts of a config that a resumed run may change; everything else decides what is learnt."""

DATA_MAY_CHANGE_ON_RESUME = (
    *("batch_size", "global_batch_size", "num_workers", "prefetch_factor"),
    *("cache", "drop_log", "max_dropped_share"),
)
"""Parts of `data` that say who reads, and from where; the samples and their order stay the same."""
DATASET_MAY_CHANGE_ON_RESUME = ("urls", "index", "storage_options")
"""Where a dataset lies. The checkpoint knows its shards by name and size, and refuses others."""


def stage_number(config: DictConfig) -> int:
    """1 or 2, by the stage's class."""
    return _known(STAGES, config.stage._target_, "stage._target_")


def _known(table: dict[str, int], target: str, where: str) -> int:
    if target not in table:
        raise ConfigError(f"{target} belongs to no stage", where=where, fix=f"one of {', '.join(table)}")
    return table[target]


def check_train(config: DictConfig) -> None:
    """All checks of a training config; what is left of a removed loss is removed from it.

    Raises:
        ConfigError: see each check.
    """
    absent = [name for name in ("stage", "model", "data", "optim") if not config.get(name, None)]
    if absent:
        raise ConfigError(
            f"no {', no '.join(absent)} chosen",
            where=", ".join(f"{name}=" for name in absent),
            fix="choose an experiment=, or stage=stage1 model=blip2_stage1 data=stage1 data/tokenizer=... optim=...",
        )
    _drop_removed_objectives(config)
    _check_stage_and_model(config)
    check_first_weights(config, stage_number(config))
    check_precision(config)
    _check_global_batch(config)
    _check_sharing(config)
    _check_optim(config)
    check_health(config.get("health") or {})
    if config.log_every_steps < 1:
        raise ConfigError(
            f"log_every_steps is {config.log_every_steps}",
            where="log_every_steps",
            fix="give 1 or more optimizer steps",
        )


def _drop_removed_objectives(config: DictConfig) -> None:
    """`~objective@stage.objectives.itm` takes the loss away, but not what an experiment had set of it."""
    objectives = config.stage.get("objectives", {})
    for name in [name for name, objective in objectives.items() if "_target_" not in objective]:
        log.info("without %s: its settings %s have nothing to act on", name, OmegaConf.to_container(objectives[name]))
        with open_dict(objectives):
            del objectives[name]


def _check_stage_and_model(config: DictConfig) -> None:
    stage, model = stage_number(config), _known(MODELS, config.model._target_, "model._target_")
    if stage != model:
        raise ConfigError(
            f"stage {stage} cannot train a stage-{model} model",
            where=f"stage._target_={config.stage._target_}, model._target_={config.model._target_}",
            fix=f"use model=blip2_stage{stage}, or stage=stage{model}",
        )


def num_devices(config: DictConfig) -> int | None:
    """Devices on all nodes; None where Lightning decides their number."""
    devices, nodes = config.trainer.get("devices", 1), config.trainer.get("num_nodes", 1)
    return devices * int(nodes) if isinstance(devices, int) and devices >= 1 else None


def device_batch(config: DictConfig) -> int:
    """Pairs per device in one forward pass.

    Raises:
        ConfigError: the sizes contradict each other, or a global one is given and no number of devices.
    """
    devices, data = num_devices(config), config.data
    if devices is None and data.get("global_batch_size") is not None:
        raise ConfigError(
            f"devices={config.trainer.devices} share a global batch of {data.global_batch_size}",
            where="trainer.devices, data.global_batch_size",
            fix="give the number of devices",
        )
    return batch_per_device(data.get("batch_size"), data.get("global_batch_size"), devices or 1)


def contrastive_batch(config: DictConfig) -> int | None:
    """Pairs over all devices in one forward pass, G; None where Lightning decides it by the number of devices."""
    devices, total = num_devices(config), config.data.get("global_batch_size")
    if devices is None:
        return int(total) if total is not None else None
    return devices * device_batch(config)


def _check_sharing(config: DictConfig) -> None:
    devices, data = num_devices(config), config.data
    if devices is not None and "num_streams" in data:
        check_readers(data.num_streams, devices, data.num_workers)


def _check_global_batch(config: DictConfig) -> None:
    batch_per_device(config.data.get("batch_size"), config.data.get("global_batch_size"), num_devices(config) or 1)
    contrastive = contrastive_batch(config)
    if contrastive is None:
        log.info("global batch: devices=%s is decided at start", config.trainer.devices)
        return
    accumulate = config.trainer.get("accumulate_grad_batches", 1)
    batch = contrastive * accumulate
    negatives = f"; contrastive negatives come from {contrastive} of it" if stage_number(config) == 1 else ""
    log.info("global batch %d%s", batch, negatives)
    if config.expected_global_batch and batch != config.expected_global_batch:
        raise ConfigError(
            f"the global batch is {batch}, the experiment expects {config.expected_global_batch}",
            where="data.batch_size (or data.global_batch_size), trainer.devices, trainer.num_nodes, "
            "trainer.accumulate_grad_batches",
            fix=f"make their product {config.expected_global_batch}, or set expected_global_batch=null to mean it",
        )


def _check_optim(config: DictConfig) -> None:
    if config.optim.warmup_steps >= config.trainer.max_steps:
        raise ConfigError(
            f"{config.optim.warmup_steps} warm-up steps in a run of {config.trainer.max_steps}",
            where="optim.warmup_steps, trainer.max_steps",
            fix="set optim.warmup_steps well below trainer.max_steps",
        )
    check_schedule(
        config.optim.get("schedule", "cosine"),
        steps_per_epoch=config.optim.get("steps_per_epoch"),
        max_steps=config.trainer.max_steps,
    )


def check_same_run(now: DictConfig, before: Any, run: RunDir) -> None:
    """A resumed run must be the run it continues: name the values that differ.

    Raises:
        ConfigError: a value that decides what is learnt has changed.
    """
    changed = sorted(
        f"{key}: {old!r} -> {new!r}"
        for key, (old, new) in _learning_differences(_learning_values(before), _learning_values(now)).items()
    )
    if changed:
        raise ConfigError(
            f"{len(changed)} settings differ from the run to be resumed:\n    " + "\n    ".join(changed[:10]),
            where=str(run.config_path),
            fix="give the same settings to continue it, or another run_dir= for a new run",
        )


def _learning_values(config: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    kept = {str(key): value for key, value in plain.items() if key not in MAY_CHANGE_ON_RESUME}
    kept["trainer.precision"] = plain["trainer"].get("precision")
    kept["trainer.accumulate_grad_batches"] = plain["trainer"].get("accumulate_grad_batches")
    return kept


def _learning_differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    ignored = ("run_dir", "resume", *(f"data.{name}" for name in DATA_MAY_CHANGE_ON_RESUME))
    # it trades memory for time and changes no value: what a run out of memory may turn on
    memory_only = (".checkpoint_activations", ".micro_batch_size")
    places = re.compile(rf"data\.datasets\.[^.]+\.({'|'.join(DATASET_MAY_CHANGE_ON_RESUME)})(\.|$)")
    return {
        key: values
        for key, values in differences(before, now).items()
        if not key.startswith(ignored) and not key.endswith(memory_only) and not places.match(key)
    }
