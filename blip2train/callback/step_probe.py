"""A training that stops after a few optimizer steps and writes down what they took: the step that `doctor` tries."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from blip2train import distributed
from blip2train.callback.micro_batch import between_micro_batches
from blip2train.errors import ConfigError
from blip2train.run_dir import write_json


class StepProbe(pl.Callback):
    """Times optimizer steps from the arrival of one batch to the next, stops the run, and writes a JSON file.

    The file has seconds per step and of waiting for data (of the slowest rank), samples per step of all ranks, and the
    highest use of memory of the fullest rank, checkpoint included: reserved on the GPU, resident in main memory.

    Args:
        steps: optimizer steps until the run stops.
        out: the file.
    """

    def __init__(self, steps: int, out: str) -> None:
        if steps < 1:
            raise ConfigError(f"steps is {steps}", where="steps", fix="give 1 or more")
        self._steps, self._out = steps, Path(out)
        self._step_seconds: list[float] = []
        self._data_seconds: list[float] = []
        self._samples = 0
        self._begin = self._batch_end = self._waited = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin = self._batch_end = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._batch_end

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now = self._batch_end = time.perf_counter()
        self._samples += int(outputs["samples"])
        if between_micro_batches(trainer):
            return
        self._step_seconds.append(now - self._begin)
        self._data_seconds.append(self._waited)
        self._begin, self._waited = now, 0.0
        if len(self._step_seconds) >= self._steps:
            trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last checkpoint: gathering what it holds takes memory, too."""
        own = {
            "step_seconds": self._step_seconds,
            "data_seconds": self._data_seconds,
            "samples": self._samples,
            **_memory(trainer.strategy.root_device),
        }
        ranks = distributed.gather_objects([own])
        if trainer.is_global_zero:
            write_json(self._out, _together(ranks))


def _memory(device: torch.device) -> dict[str, int]:
    """Bytes used at most and in all: of the GPU, and of main memory by this process."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type != "cuda":
        return {"peak_bytes": 0, "device_bytes": 0, "host_bytes": resident}
    total = torch.cuda.get_device_properties(device).total_memory
    return {"peak_bytes": torch.cuda.max_memory_reserved(device), "device_bytes": total, "host_bytes": resident}


def _together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The measure of a run: the slowest of each step, the fullest of each memory."""
    slowest = {
        name: [max(values) for values in zip(*(rank[name] for rank in ranks), strict=True)]
        for name in ("step_seconds", "data_seconds")
    }
    steps = len(slowest["step_seconds"])
    fullest = max(ranks, key=lambda rank: rank["peak_bytes"] / max(rank["device_bytes"], 1))
    return {
        **slowest,
        "samples_per_step": sum(rank["samples"] for rank in ranks) // max(steps, 1),
        "peak_bytes": fullest["peak_bytes"],
        "device_bytes": fullest["device_bytes"],
        "host_bytes": max(rank["host_bytes"] for rank in ranks),
        "world_size": len(ranks),
    }
