"""What the checks share: the config, the launch, and what an earlier check has measured for a later one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from blip2train.cli.doctor.launch import Launch, Meeting
from blip2train.errors import ConfigError

OWN_KEYS = ("out", "only", "skip", "steps", "shards", "check_minutes")
"""What configs/doctor.yaml has and a training does not know."""


@dataclass(frozen=True, slots=True)
class StepMeasure:
    """What a few steps of the real config took, as `callback/step_probe.py` wrote it.

    Args:
        step_seconds: of each optimizer step, in order, waiting for data included; the slowest rank's.
        data_seconds: the part of it that was spent waiting for the loader.
        samples_per_step: of all ranks.
        peak_bytes: what torch had reserved at most on the fullest GPU; 0 on a CPU.
        device_bytes: memory of that GPU; 0 on a CPU.
        host_bytes: main memory that the largest training process had at most.
        world_size: ranks.
    """

    step_seconds: tuple[float, ...]
    data_seconds: tuple[float, ...]
    samples_per_step: int
    peak_bytes: int
    device_bytes: int
    host_bytes: int
    world_size: int

    @property
    def seconds(self) -> float:
        """Of one step: the median of all but the first, which starts workers and fills caches."""
        return _median(self.step_seconds[1:] or self.step_seconds)

    @property
    def waiting(self) -> float:
        """Share of the steps but the first that was spent waiting for data."""
        steps, waits = self.step_seconds[1:] or self.step_seconds, self.data_seconds[1:] or self.data_seconds
        return sum(waits) / max(sum(steps), 1e-9)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> StepMeasure:
        """Of the probe's file."""
        sequences = {name: tuple(facts[name]) for name in ("step_seconds", "data_seconds")}
        return cls(**facts | sequences)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


@dataclass(slots=True)
class Facts:
    """What checks measured, None while nothing has.

    Args:
        trainable_parameters: of the model.
        first_step: optimizer steps that the run has behind it.
        weight_bytes: of all its parameters, in the formats they are stored in.
        checkpoint_bytes: of one checkpoint.
        write_bytes_per_s: of the disk that the checkpoints go to, flushed.
        loader_samples_per_s: what one loader process reads, decodes and collates.
        step: a few steps of the real config.
    """

    trainable_parameters: int | None = None
    first_step: int = 0
    weight_bytes: int | None = None
    checkpoint_bytes: int | None = None
    write_bytes_per_s: float | None = None
    loader_samples_per_s: float | None = None
    step: StepMeasure | None = None


@dataclass(slots=True)
class Context:
    """The subject of a check.

    Args:
        config: as for `train`.
        launch: the processes of this command.
        arguments: of the command line, for a training of the same config.
        seconds: that a check may take.
        steps, shards: see configs/doctor.yaml.
        say: shows what a slow check is doing.
        built: the config that training would build (`features=` resolved); None until it is known.
        resume: the checkpoint that the run would go on from.
        meeting: of the children of a check that all processes take part in.
        facts: measured so far.
    """

    config: DictConfig
    launch: Launch
    arguments: Sequence[str] = ()
    seconds: float = 600.0
    steps: int = 3
    shards: int = 6
    say: Callable[[str], None] = lambda text: None
    built: DictConfig | None = None
    resume: Path | None = None
    meeting: Meeting | None = None
    facts: Facts = field(default_factory=Facts)

    @property
    def run_dir(self) -> Path:
        return Path(str(self.config.run_dir)).absolute()

    @property
    def to_build(self) -> DictConfig:
        return self.config if self.built is None else self.built


def of_training(config: DictConfig) -> DictConfig:
    """A copy of the doctor's config without its own keys: what `train` would be given."""
    plain = copy.deepcopy(config)
    with open_dict(plain):
        for key in OWN_KEYS:
            del plain[key]
    return plain


def uses_gpu(config: DictConfig, gpus: int) -> bool:
    """Whether training would run on GPUs."""
    accelerator = str(config.trainer.get("accelerator", "auto"))
    return accelerator in {"gpu", "cuda"} or (accelerator == "auto" and gpus > 0)


def devices_per_node(config: DictConfig, gpus: int) -> int:
    """Devices of one machine that a config asks for; "auto" and -1 are all GPUs there are, or one CPU process.

    Raises:
        ConfigError: neither a number, a list of numbers, nor "auto".
    """
    wanted: Any = config.trainer.get("devices", "auto")
    if OmegaConf.is_list(wanted):
        return len(wanted)
    if isinstance(wanted, str) and wanted.lstrip("-").isdecimal():
        wanted = int(wanted)
    if wanted in ("auto", -1):
        return max(1, gpus) if uses_gpu(config, gpus) else 1
    if isinstance(wanted, int) and wanted >= 1:
        return wanted
    raise ConfigError(f"devices is {wanted!r}", where="trainer.devices", fix="a number of devices, or auto")


def world_size(config: DictConfig, gpus: int) -> int:
    """Ranks of the training."""
    return devices_per_node(config, gpus) * int(config.trainer.get("num_nodes", 1))


def zero_stage(config: DictConfig) -> int | None:
    """The stage of a DeepSpeed strategy; None for another one."""
    strategy = config.trainer.get("strategy", "auto")
    if OmegaConf.is_dict(strategy):
        return int(strategy.get("stage", 2)) if str(strategy.get("_target_")).endswith(".ZeroStrategy") else None
    return 2 if "deepspeed" in str(strategy) else None


def shards_weights(config: DictConfig) -> bool:
    """Whether a device holds a part of the weights only, and gathers the others whenever it uses them."""
    strategy = config.trainer.get("strategy", "auto")
    target = str(strategy.get("_target_") if OmegaConf.is_dict(strategy) else strategy)
    return zero_stage(config) == 3 or "fsdp" in target.lower()
