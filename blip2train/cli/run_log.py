"""A train config -> what is logged of the run, and to whom: loggers, chance levels, the operations of a sample."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from blip2train.cli import check
from blip2train.cli.config import build
from blip2train.errors import ConfigError
from blip2train.objective.chance import chance_level
from blip2train.run_dir import RunDir

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

    from blip2train.callback.compute import SampleFlops
    from blip2train.callback.finite import FiniteCallback
    from blip2train.callback.health import HealthCallback
    from blip2train.callback.metrics import MetricsCallback
    from blip2train.callback.progress import ProgressCallback
    from blip2train.callback.step_clock import StepClock
    from blip2train.data.datamodule import BlipDataModule

log = logging.getLogger(__name__)


def build_loggers(config: DictConfig, run: RunDir, resume_step: int) -> list[Logger]:
    """The two files that are always written, and what `logger=` names.

    A logger that has to know where a resumed run begins is `_partial_` in its yaml and gets `resume_step`.
    """
    from blip2train.callback.file_logger import FileLogger

    chosen = [build(logger) for logger in (config.get("logger") or {}).values()]
    finished = [made(resume_step=resume_step) if isinstance(made, functools.partial) else made for made in chosen]
    return [FileLogger(run, resume_step=resume_step), *finished]


def chance_levels(config: DictConfig, data: BlipDataModule) -> dict[str, float]:
    """What each loss is for a model that has learned nothing; the report draws them as lines.

    To be asked once training has its processes: Lightning may decide their number, and with it how many pairs an image
    is told from.
    """
    from blip2train import distributed

    vocab_size = data.collator.tokenizer.vocab_size  # type: ignore[attr-defined]  # of whatever collates texts
    if check.stage_number(config) == 2:
        return {"train/lm_loss": chance_level("lm", vocab_size=vocab_size)}
    batch = check.contrastive_batch(config) or check.device_batch(config) * distributed.world_size()
    levels = {
        "itc": {"loss": chance_level("itc", batch_size=batch), "i2t_accuracy": 1 / batch, "t2i_accuracy": 1 / batch},
        "itm": {"loss": chance_level("itm"), "accuracy": 2 / 3},
        "itg": {"loss": chance_level("itg", vocab_size=vocab_size)},
    }
    trained = [name for name, objective in config.stage.objectives.items() if objective.get("weight", 1.0)]
    return {f"train/{name}_{metric}": level for name in trained for metric, level in levels.get(name, {}).items()}


def build_watchers(
    config: DictConfig, built: DictConfig, data: BlipDataModule, finite: FiniteCallback, health: HealthCallback
) -> tuple[MetricsCallback, ProgressCallback, StepClock]:
    """The callbacks that measure a training and show it; the clock has to be the last one of the trainer.

    Args:
        config: as the user gave it; loggers show it.
        built: what is trained; differs where features were cached.
        data: what it is trained on.
        finite: counts skipped and clipped steps.
        health: looks at every log entry.
    """
    from blip2train.callback.metrics import MetricsCallback
    from blip2train.callback.progress import ProgressCallback
    from blip2train.callback.step_clock import StepClock

    clock = StepClock()
    metrics = MetricsCallback(
        config.log_every_steps,
        clock,
        more=lambda: data.progress() | finite.progress(),
        watch=health.on_entry,
        chance=functools.partial(chance_levels, config, data),
        flops=_flops_on_main_process(built),
        peak_tflops=config.peak_tflops,
        settings=shown_settings(config),
    )
    return metrics, ProgressCallback(f"stage {check.stage_number(config)}", lambda: metrics.latest), clock


def shown_settings(config: DictConfig) -> dict[str, Any]:
    """The resolved config for loggers, which may send it elsewhere: without the keys to where shards are stored."""

    def without_keys(value: Any) -> Any:
        if isinstance(value, list):
            return [without_keys(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {str(key): without_keys(item) for key, item in value.items() if key != "storage_options"}

    shown: dict[str, Any] = without_keys(OmegaConf.to_container(config, resolve=True))
    return shown


def _flops_on_main_process(config: DictConfig) -> SampleFlops | None:
    """Operations of a sample, where a GPU trains or `peak_tflops` asks: counting takes seconds."""
    import torch
    from pytorch_lightning.utilities import rank_zero_only

    from blip2train.cli.sample_flops import count_sample_flops

    on_gpu = config.trainer.get("accelerator", "auto") != "cpu" and torch.cuda.is_available()
    is_main = getattr(rank_zero_only, "rank", 0) == 0  # the launcher's word: there is no process group yet
    if not is_main or not (on_gpu or config.peak_tflops):
        return None
    try:
        return count_sample_flops(config)
    except ConfigError as error:
        log.warning("no MFU: %s", error.found)
        return None
