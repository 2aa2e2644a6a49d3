"""Log entries and weights -> warnings that name their likely cause; what is judged, and how, is in `health/`."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from blip2train import distributed
from blip2train.callback.bad_step import Step
from blip2train.callback.micro_batch import between_micro_batches
from blip2train.callback.spike import SpikeWatch
from blip2train.callback.warning_log import WarningLog
from blip2train.health.finding import Finding
from blip2train.health.rule import PATIENCE, Setting, find, learning_rate_stands
from blip2train.health.weight_watch import WeightWatch

_MOST_NAMES = 5


class HealthCallback(pl.Callback):
    """Watches a training and changes nothing in it. What it remembers is saved with the trainer's state.

    Args:
        warnings: where findings are said.
        setting: what the rules compare with.
        spike_size: see `SpikeDetector`.
        weights_every_steps: steps between two looks at the frozen weights; 0 never looks.
    """

    def __init__(self, warnings: WarningLog, setting: Setting, *, spike_size: float, weights_every_steps: int) -> None:
        self._warnings, self._setting, self._every = warnings, setting, weights_every_steps
        self._spikes = SpikeWatch(warnings, spike_size)
        self._entries: deque[tuple[int, dict[str, float]]] = deque(maxlen=PATIENCE)
        self._rates: deque[tuple[int, float]] = deque(maxlen=PATIENCE)
        self._trainer: pl.Trainer | None = None
        self._weights: WeightWatch | None = None
        self._first_step = self._looked_step = 0
        self._looked_for_still = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trainer, self._first_step = trainer, trainer.global_step
        self._warnings.begin(trainer.global_step)
        if self._every:
            self._weights = WeightWatch(pl_module.model)  # type: ignore[arg-type]

    def on_step(self, trainer: pl.Trainer, step: Step) -> None:
        """One optimizer step that is about to be taken, on every rank."""
        self._spikes.look(trainer, step)

    def on_entry(self, step: int, entry: Mapping[str, float]) -> None:
        """One finished log entry."""
        assert self._trainer is not None
        self._entries.append((step, {name: float(value) for name, value in entry.items()}))
        rates = [float(group["lr"]) for group in self._trainer.optimizers[0].param_groups]
        self._rates.append((step, max(rates)))
        for finding in find(list(self._entries), self._setting):
            self._warnings.say(step, finding)
        standing = learning_rate_stands(list(self._rates), self._scheduled())
        if standing is not None:
            self._warnings.say(step, standing)

    def _scheduled(self) -> list[float]:
        """What the schedule says for the remembered steps; empty for a scheduler that cannot be asked."""
        assert self._trainer is not None
        schedulers = [config.scheduler for config in self._trainer.lr_scheduler_configs]
        factor = getattr(schedulers[0], "lr_lambdas", None) if schedulers else None
        return [factor[0](step) for step, _ in self._rates] if factor else []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._every and step and step % self._every == 0 and not between_micro_batches(trainer):
            self._look_at_weights(step, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._every and trainer.global_step != self._looked_step:
            self._look_at_weights(trainer.global_step, pl_module)

    def _look_at_weights(self, step: int, pl_module: pl.LightningModule) -> None:
        if self._weights is None or step == self._looked_step:
            return
        self._looked_step = step
        moved = sorted(set(distributed.gather_objects(self._weights.moved(pl_module.model))))  # type: ignore[arg-type]
        if moved:
            self._warnings.say(step, _moved(moved), parameters=moved[:100])
        if not self._looked_for_still and step - self._first_step >= self._setting.settle_steps:
            self._looked_for_still = True
            still, whole = self._still(self._weights, pl_module)
            if still:
                self._warnings.say(step, _never_moved(still, whole, step - self._first_step), parameters=still[:100])

    def _still(self, weights: WeightWatch, pl_module: pl.LightningModule) -> tuple[list[str], int]:
        """Trainable parameters no shard of which has moved, and how many there are."""
        own_still = weights.still(pl_module.model)  # type: ignore[arg-type]
        own_moved = [name for name in weights.trained if name not in set(own_still)]
        still = set(distributed.gather_objects(own_still))
        moved = set(distributed.gather_objects(own_moved))
        return sorted(still - moved), len(still | moved)

    def state_dict(self) -> dict[str, Any]:
        return {
            "warnings": self._warnings.state_dict(),
            "spikes": self._spikes.state_dict(),
            "entries": [[step, dict(entry)] for step, entry in self._entries],
            "rates": [list(pair) for pair in self._rates],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._warnings.load_state_dict(state_dict["warnings"])
        self._spikes.load_state_dict(state_dict["spikes"])
        self._entries = deque(((step, entry) for step, entry in state_dict["entries"]), maxlen=PATIENCE)
        self._rates = deque(((step, rate) for step, rate in state_dict["rates"]), maxlen=PATIENCE)


def _moved(names: list[str]) -> Finding:
    return Finding(
        "frozen_weight_moved",
        f"{len(names)} frozen parameters are not what they were at the start: {_some(names)}",
        "a parameter was handed to the optimizer before it was frozen, or code writes to it",
        "`blip2train show params`, and any callback or part of your own; checkpoints hold no frozen weights, so "
        "evaluation would use the old ones",
    )


def _never_moved(names: list[str], total: int, steps: int) -> Finding:
    return Finding(
        "trainable_weight_still",
        f"{len(names)} of {total} trainable parameters have not changed in {steps} steps: {_some(names)}",
        "no loss reaches them, or the learning rate is too small for their number format",
        "stage.objectives, optim.lr, trainer.precision",
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (" ..." if len(names) > _MOST_NAMES else "")
