"""`health:` of a train config -> the callbacks that keep bad numbers out of the weights and warn of odd ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir

if TYPE_CHECKING:
    from blip2train.callback.finite import FiniteCallback
    from blip2train.callback.health import HealthCallback

_WHOLE = ("max_skipped_steps", "settle_steps", "weights_every_steps")


def check_health(config: Mapping[str, Any]) -> None:
    """Imports no torch. An older run's config has no such block, and needs none to be looked at.

    Raises:
        ConfigError: a threshold that cannot be one.
    """
    for name, value in config.items():
        whole = name in _WHOLE
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value >= 0:
            kind = "a whole number" if whole else "a number"
            raise ConfigError(f"{name} is {value!r}", where=f"health.{name}", fix=f"give {kind} of 0 or more")


def build_health(config: DictConfig, run: RunDir) -> tuple[FiniteCallback, HealthCallback]:
    """Both callbacks of a training; the first has to come before whatever else reads gradients."""
    from blip2train.callback.bad_step import BadStepRecorder
    from blip2train.callback.finite import FiniteCallback
    from blip2train.callback.health import HealthCallback
    from blip2train.callback.warning_log import WarningLog
    from blip2train.health.rule import Setting
    from blip2train.objective.context import MIN_TEMPERATURE

    warnings = WarningLog(run)
    setting = Setting(config.settle_steps, config.max_data_wait, MIN_TEMPERATURE)
    health = HealthCallback(
        warnings, setting, spike_size=config.spike_size, weights_every_steps=config.weights_every_steps
    )
    return FiniteCallback(BadStepRecorder(run), warnings, config.max_skipped_steps, health.on_step), health
