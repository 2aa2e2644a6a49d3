"""A full memory during a training -> one error: what was being done, what the config needs, and what to turn."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from blip2train.cli.check import device_batch, num_devices, stage_number
from blip2train.cli.config import resolved_yaml
from blip2train.errors import Blip2TrainError, ConfigError

ESTIMATE_SECONDS = 90.0
"""Of seconds that a real size takes on a free core, many times over."""
_CPU_SIGNS = ("can't allocate memory", "not enough memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's or the host's allocator has raised this, or what caused it."""
    import torch

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Blip2TrainError):
        if isinstance(cause, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(cause, RuntimeError) and any(sign in str(cause).lower() for sign in _CPU_SIGNS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def out_of_memory(config: DictConfig, doing: str, error: BaseException, *, alone: bool = True) -> ConfigError:
    """The error to show instead of the allocator's.

    Args:
        config: of the training.
        doing: what it was at, in words.
        error: the allocator's.
        alone: no other rank waits meanwhile: there is time for the estimate.
    """
    said = str(error).strip().splitlines() or [type(error).__name__]
    needs = estimated_peak(config) if alone else None
    estimate = f"the estimate of this config is {needs}; line by line" if needs else "what this config needs"
    return ConfigError(
        f"out of memory in {doing}: {said[0]}\n  {estimate}: {estimate_command()}",
        where="data.batch_size, model, trainer",
        fix="\n         ".join(["one or more of these, most effective first:", *settings_to_turn(config)]),
    )


def settings_to_turn(config: DictConfig) -> list[str]:
    """Three overrides that lower the peak, with values for this config."""
    batch = device_batch(config)
    micro = config.stage.get("micro_batch_size", None) or batch
    ways = []
    if micro > 1 and stage_number(config) == 1:
        ways.append(f"stage.micro_batch_size={micro // 2}  (loss and gradients stay those of the batch of {batch})")
    elif batch > 1:
        steps = int(config.trainer.get("accumulate_grad_batches", 1)) * 2
        size = f"data.batch_size={batch // 2}"
        if config.data.get("global_batch_size") is not None:
            size = f"data.global_batch_size={config.data.global_batch_size // 2}"
        ways.append(f"{size} trainer.accumulate_grad_batches={steps}  (the same global batch)")
    if not config.model.qformer.get("checkpoint_activations", False):
        ways.append("model.qformer.checkpoint_activations=true  (the same values, more time)")
    ways.append(_sharing_or_format(config))
    return ways


def _sharing_or_format(config: DictConfig) -> str:
    devices = num_devices(config)
    if (devices is None or devices > 1) and "Parallel" not in str(config.trainer.get("strategy", "")):
        name = str(config.trainer.get("strategy", "")).lower()
        if "zero" not in name and "deepspeed" not in name and "fsdp" not in name:
            return "trainer=fsdp2, or trainer=deepspeed_zero2  (optimizer state and gradients shared among the devices)"
    language_model = config.model.get("language_model", None)
    if language_model is not None and str(language_model.get("dtype", "")) == "float32":
        return "model.language_model.dtype=bfloat16  (half the bytes of the frozen language model)"
    if str(config.trainer.get("precision")) in ("32-true", "32", "None"):
        return "trainer.precision=bf16-mixed  (half the bytes of most activations)"
    return "a larger device, or more of them: trainer=fsdp2 trainer.devices=N"


def estimate_command() -> str:
    """`blip2train show estimate` with the overrides of this very training."""
    task = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return shlex.join(["blip2train", "show", "estimate", *(task or ["experiment=..."])])


def estimated_peak(config: DictConfig) -> str | None:
    """Peak of one device in words, by a process of its own: this one has no memory left, and may be one of several.

    Returns:
        None where it takes too long, or finds no memory either.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(resolved_yaml(config), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, str(path)], capture_output=True, text=True, timeout=ESTIMATE_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _print_peak(path: str) -> None:
    from omegaconf import OmegaConf

    from blip2train.cli.config import register_resolvers
    from blip2train.cli.estimate import estimate
    from blip2train.cli.features import with_features
    from blip2train.model.memory import GIB

    register_resolvers()
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    result = estimate(with_features(config), accelerator=config.trainer.get("accelerator") != "cpu")
    sys.stdout.write(f"{result.peak / GIB:.2f} GiB at its peak for {result.batch_size} pairs per device\n")


if __name__ == "__main__":
    _print_peak(sys.argv[1])
