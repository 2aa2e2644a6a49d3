"""A loss per step -> a trained module: the one loop that makes every tiny backbone, with resume and progress.

Implements AdamW with linear warm-up and cosine decay, counted in steps, never seconds, so that a slow machine gives
the same backbone. LAVIS has no counterpart: its backbones are downloaded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2train.errors import CheckpointError
from blip2train.optim.schedule import warmup_cosine

logger = logging.getLogger(__name__)

FAST_FACTOR = 10.0
"""For scalars that must grow to about 5: at the rate of the weights that takes thousands of steps."""

Progress = Callable[[int, int, float], None]
"""Called with steps done, steps in all, and the last loss."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How one backbone is trained.

    Args:
        steps: optimizer steps in all.
        batch_size: documents or images per step.
        lr: peak learning rate.
        warmup_steps: linear warm-up.
        weight_decay: AdamW's, on everything but fast parameters.
        bfloat16: compute in bfloat16 under autocast; twice as fast on CPUs that have it, slower on those that do not.
        seed: of the initial weights and of every batch.
        save_every_steps: how often the state to resume from is written.
    """

    steps: int
    batch_size: int
    lr: float
    warmup_steps: int = 200
    weight_decay: float = 0.01
    bfloat16: bool = False
    seed: int = 0
    save_every_steps: int = 250


def train(
    module: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    plan: Plan,
    state_path: Path,
    progress: Progress | None = None,
    fast_parameters: Sequence[nn.Parameter] = (),
) -> None:
    """Train `module` in place for `plan.steps`, or for what is left of them if `state_path` holds an earlier part.

    Args:
        module: what is trained; its parameters are all that the loss depends on beside the step.
        loss_of_step: step number -> scalar loss; draws its own batch from (seed, step), so that a resumed run
            continues exactly.
        plan: the recipe.
        state_path: file to resume from; its removal is the caller's, once the result is safe.
        progress: called after every step.
        fast_parameters: some of the module's, trained at `FAST_FACTOR` times the rate.

    Raises:
        CheckpointError: the state belongs to another plan.
    """
    optimizer = _optimizer(module, plan, fast_parameters)
    first = _resume(module, optimizer, plan, state_path)
    began = reported = time.monotonic()
    module.train()
    for step in range(first, plan.steps):
        factor = warmup_cosine(step, warmup_steps=plan.warmup_steps, max_steps=plan.steps)
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * group["rate"] * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bfloat16):
            loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if progress is not None:
            progress(done, plan.steps, float(loss.detach()))
        if time.monotonic() - reported > 20 or done == plan.steps:
            reported = time.monotonic()
            rate = (done - first) / (reported - began)
            logger.info(
                "step %d of %d, loss %.3f, %.1f steps/s, %.0f s left",
                done, plan.steps, float(loss.detach()), rate, (plan.steps - done) / rate,
            )  # fmt: skip
        if done % plan.save_every_steps == 0 and done < plan.steps:
            _save(module, optimizer, plan, done, state_path)
    module.eval()


def _optimizer(module: nn.Module, plan: Plan, fast: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    chosen = {id(parameter) for parameter in fast}
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in module.parameters() if id(parameter) not in chosen], "rate": 1.0},
        {"params": list(fast), "rate": FAST_FACTOR, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.98), weight_decay=plan.weight_decay)


def _save(module: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, done: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    state = {"plan": asdict(plan), "done": done, "module": module.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, partial)
    partial.replace(path)


def _resume(module: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, path: Path) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    if state["plan"] != asdict(plan):
        raise CheckpointError(
            f"an interrupted run with another plan: {state['plan']}",
            where=str(path),
            fix="repeat that run with its own settings, or delete this file to start anew",
        )
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    logger.info("continuing after step %d of %d (%s)", state["done"], plan.steps, path)
    return int(state["done"])
