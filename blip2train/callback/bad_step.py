"""A step that is not finite -> `bad_steps/step-N/` of the run folder: which module, which keys, and the batches.

The micro-batch is run forward once more under the same randomness (a step's is a function of its index, see
`seed_batch`) with hooks on every module. All ranks do so together: a forward pass exchanges features between them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from blip2train import distributed
from blip2train.batch_file import save_batch
from blip2train.health.probe import is_finite, local_part, watch
from blip2train.run_dir import RunDir, write_json

KEPT = 5
"""Folders kept of one run: the first ones, and the latest."""

_MOST_BATCHES = 8
"""Ranks whose batches are written, at most."""

_MOST_NAMES = 20


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step that is about to be taken.

    Args:
        number: as logged, from 1.
        loss: mean over ranks; NaN where any rank's is not finite.
        norm: of the gradient, before clipping.
        batches: (index, batch) of each of its micro-batches on this rank.
        losses: their losses on this rank, each divided by the number of micro-batches.
    """

    number: int
    loss: float
    norm: float
    batches: Sequence[tuple[int, Any]]
    losses: Sequence[Tensor]


class BadStepRecorder:
    """Writes bad steps down; to be called on all ranks together.

    Args:
        run: the run folder.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run

    def record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, *, last: bool) -> str:
        """Find out, write, and say it in short.

        Args:
            last: the run ends with this step, which is therefore kept whatever came before.

        Returns:
            `: image_proj gave NaN on rank 1, keys a b c; report DIR`.
        """
        folder = self._run.bad_steps / f"step-{step.number:07d}"
        place = _suspect(step.losses)
        gradient = _gradient_facts(pl_module)
        local = _run_again(trainer, pl_module, step, place) | {"gradient": gradient}
        ranks: list[dict[str, Any]] = distributed.gather_objects([local])
        if not self._make_room(folder, last):
            return f"{_in_short(ranks)}; {KEPT} reports are kept already, this one is not"
        guilty = [facts["rank"] for facts in _guilty(ranks)][:_MOST_BATCHES]
        problem = None
        try:
            if distributed.rank() in (guilty or range(_MOST_BATCHES)):
                index, batch = step.batches[place]
                path = folder / f"batch-rank{distributed.rank()}.pt"
                save_batch(batch, path, step=step.number, batch_index=index, rank=distributed.rank())
            if distributed.is_main():
                write_json(folder / "report.json", _report(trainer, pl_module, step, ranks))
        except (OSError, RuntimeError) as error:  # torch.save knows a full disk as the latter
            problem = str(error).splitlines()[0]
        problems = [said for said in distributed.gather_objects([problem]) if said]
        if problems:
            return f"{_in_short(ranks)}; the report could not be written: {problems[0]}"
        return f"{_in_short(ranks)}; report: {folder / 'report.json'}"

    def _make_room(self, folder: Any, last: bool) -> bool:
        """Whether this step is to be kept; the last one of a run takes the place of the one before."""
        known = sorted(self._run.bad_steps.glob("step-*")) if distributed.is_main() else []
        known = distributed.gather_objects([path.name for path in known])
        others = [name for name in known if name != folder.name]
        if len(others) < KEPT:
            return True
        if last and distributed.is_main():
            shutil.rmtree(self._run.bad_steps / others[-1])
        return last


def _suspect(losses: Sequence[Tensor]) -> int:
    """Place, the same on all ranks, of the first micro-batch whose loss is not finite anywhere, else of the last."""
    bad = torch.stack([~torch.isfinite(loss) for loss in losses]).float()
    places: list[float] = distributed.reduce_sum(bad).tolist()
    return next((place for place, count in enumerate(places) if count), len(places) - 1)


def _run_again(trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, place: int) -> dict[str, Any]:
    """Forward only, under hooks; the trainer stands at the micro-batch's index meanwhile."""
    index, batch = step.batches[place]
    progress = trainer.fit_loop.epoch_loop.batch_progress.total
    ready, progress.ready = progress.ready, index + 1
    try:
        with torch.no_grad(), watch(pl_module.model) as probe:  # type: ignore[arg-type]
            output = trainer.strategy.training_step(batch, index)
    finally:
        progress.ready = ready
    assert isinstance(output, Mapping)  # of a stage, see StepOutput
    return {
        "rank": distributed.rank(),
        "batch_index": index,
        "keys": list(batch.keys),
        "loss_finite": bool(torch.isfinite(step.losses[place])),
        "losses": {name: _number(value) for name, value in output["metrics"].items()},
        "first_module": probe.first,
    }


def _gradient_facts(pl_module: pl.LightningModule) -> dict[str, Any]:
    """Norms by top-level part, of this process's shards, and the parameters whose gradient is not finite.

    Empty where the strategy keeps gradients elsewhere.
    """
    parts: dict[str, float] = {}
    names = []
    for name, parameter in pl_module.model.named_parameters():  # type: ignore[union-attr]
        if parameter.grad is None:
            continue
        part = name.split(".")[0]
        norm = float(torch.linalg.vector_norm(local_part(parameter.grad).float()))
        parts[part] = math.hypot(parts.get(part, 0.0), norm)
        if not is_finite(parameter.grad):
            names.append(name)
    return {
        "norms": {part: _json_number(norm) for part, norm in parts.items()},
        "num_not_finite": len(names),
        "not_finite": names[:_MOST_NAMES],
    }


def _report(
    trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step, ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    temperature = getattr(pl_module.model, "temperature", None)
    held = None if temperature is None else local_part(temperature).reshape(-1)[:1]  # may be another's shard
    return {
        "step": step.number,
        "found": _in_short(ranks).removeprefix(": "),
        "gradient_norm": _json_number(step.norm),
        "precision": str(trainer.precision),
        "temperature": None if held is None or not held.numel() else _number(held),
        "learning_rate": max(group["lr"] for group in trainer.optimizers[0].param_groups),
        "seed": getattr(pl_module, "seed", None),
        "ranks": ranks,
    }


def _in_short(ranks: list[dict[str, Any]]) -> str:
    """The first thing that went wrong in the forward pass; if nothing did, in the backward pass."""
    for facts in _guilty(ranks):
        first = facts["first_module"]
        if first:
            kind = "NaN" if first["nan"] else "infinity"
            if first["weights_not_finite"]:
                why = f"its {', '.join(first['weights_not_finite'])} is not finite"
            else:
                why = "from a finite input" if first["input_finite"] else "from an input that was so already"
            where = f"{first['module']} ({first['class']}) gave {kind} on rank {facts['rank']}"
            return f": {where}, {why}; {_keys_in_short(first, facts['keys'])}"
    for facts in ranks:
        bad = [name for name, value in facts["losses"].items() if isinstance(value, str)]
        if bad:
            return f": every module's output is finite, {', '.join(bad)} is not on rank {facts['rank']}"
    names = [name for facts in ranks for name in facts["gradient"]["not_finite"]]
    if names:
        return f": the forward pass is finite, the gradient of {names[0]} ({len(set(names))} in all) is not"
    return ": run again, the forward pass is finite"


def _guilty(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ranks at which it began: what is not finite on one reaches the losses of the others."""
    made = [facts for facts in ranks if facts["first_module"] and facts["first_module"]["input_finite"]]
    passed = [facts for facts in ranks if facts["first_module"]]
    return made or passed or [facts for facts in ranks if not facts["loss_finite"]]


def _keys_in_short(first: dict[str, Any], keys: list[str]) -> str:
    """The records at fault, where the module's rows are the batch's and not all of them are bad."""
    rows, of_batch = first["rows"], first["output_shape"][:1] == [len(keys)]
    if of_batch and len(rows) < len(keys):
        shown = [keys[row] for row in rows]
        return f"in {len(rows)} of {len(keys)} rows, keys {' '.join(shown[:5])}{' ...' if len(shown) > 5 else ''}"
    return f"keys of the batch {' '.join(keys[:5])}{' ...' if len(keys) > 5 else ''}"


def _number(value: Tensor) -> float | str:
    return _json_number(float(value))


def _json_number(value: float) -> float | str:
    """JSON knows no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
