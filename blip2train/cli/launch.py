"""Where the jobs of `blip2train train -m` run: mistakes that Hydra and Lightning would pass over are refused here."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from blip2train.cli.check import num_devices
from blip2train.errors import ConfigError

SLURM = "launcher=slurm"


def check_launcher(arguments: Sequence[str]) -> None:
    """Before Hydra composes: whether jobs can go to SLURM at all.

    Raises:
        ConfigError: no -m, without which Hydra uses no launcher; no plugin; no SLURM.
    """
    if SLURM not in arguments or "--cfg" in arguments or "-c" in arguments:
        return
    if not {"-m", "--multirun"} & set(arguments):
        raise ConfigError(
            f"{SLURM} without -m: it would train right here",
            where="launcher",
            fix="blip2train train -m launcher=slurm ...",
        )
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError(
            "hydra-submitit-launcher is not installed", where="launcher", fix="pip install 'blip2train[slurm]'"
        )
    if shutil.which("srun") is None:
        raise ConfigError("no srun on PATH", where="launcher", fix="submit from a login node of the cluster")


def check_torchrun(environment: Mapping[str, str]) -> None:
    """torchrun's restarts hand the processes the store of those before, whose addresses no longer answer.

    Reported as pytorch/pytorch#135712 and #167288; up to 2.12 the first restart fails or hangs.

    Raises:
        ConfigError: restarts are asked for, with that store.
    """
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise ConfigError(
            "torchrun --max-restarts would fail at the first restart: it keeps the addresses of the processes before",
            where="TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
            fix="start it as TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts=... ",
        )


def check_sweep(config: DictConfig) -> None:
    """A job of a sweep with several devices needs processes of its own.

    Lightning would start each further one as the whole sweep again, in lockstep until the first job that fails.

    Raises:
        ConfigError: such a job in the process of the sweep.
    """
    if num_devices(config) == 1 or os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        return
    raise ConfigError(
        f"a sweep in one process with trainer.devices={config.trainer.devices}",
        where="-m, trainer.devices",
        fix="-m launcher=slurm, or one command (or torchrun) per job, or trainer.devices=1",
    )
