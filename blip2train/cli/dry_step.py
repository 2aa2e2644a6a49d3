"""One training step as Lightning runs it, with every byte that it makes under a label; on fake tensors or on real ones.

The losses are those of the config, computed by the same objectives as in training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from blip2train.batch import Stage1Batch, Stage2Batch
from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.live_memory import LiveMemory
from blip2train.model.qformer.qformer import ImageKeysValues, QueryStates
from blip2train.objective.context import ContextSettings, Objective, Stage1Context
from blip2train.objective.draw import Draw
from blip2train.objective.language_modeling import LanguageModelingObjective

GRADIENTS = "gradients"


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What one step makes besides weights and optimizer state, in bytes by label.

    Args:
        kept: alive when the loss is known: what the backward pass needs, and the gradients that are still there.
        peak: alive at the highest point.
        peak_in_backward: whether that is in the backward pass.
    """

    kept: Mapping[str, int]
    peak: Mapping[str, int]
    peak_in_backward: bool


class LabelledContext(Stage1Context):
    """A context whose passes name the memory that they make."""

    memory: LiveMemory

    @cached_property
    def image_tokens(self) -> Tensor:
        with self.memory.labelled("image tokens"):
            return super().image_tokens

    @cached_property
    def image(self) -> ImageKeysValues:
        with self.memory.labelled("query pass"):
            return super().image

    @cached_property
    def query(self) -> QueryStates:
        with self.memory.labelled("query pass"):
            return super().query

    @cached_property
    def text_features(self) -> Tensor:
        with self.memory.labelled("text pass"):
            return super().text_features


def stage1_loss(
    model: Blip2Stage1,
    objectives: Mapping[str, Objective],
    settings: ContextSettings,
    batch: Stage1Batch,
    memory: LiveMemory,
) -> Tensor:
    """The weighted sum of stage 1's losses, as `Stage1Module.training_step` computes it."""
    context = LabelledContext(model, batch, settings, Draw(0, 0))
    context.memory = memory
    losses = []
    for name, objective in objectives.items():
        with memory.labelled(name):
            losses.append(objective.weight * objective(context).loss)
    return torch.stack(losses).sum()


def stage2_loss(
    model: Blip2Stage2, objective: LanguageModelingObjective, batch: Stage2Batch, memory: LiveMemory
) -> Tensor:
    """The loss of stage 2, as `Stage2Module.training_step` computes it."""
    with memory.labelled("query pass"):
        prompt_BQL = model.visual_prompt(batch.images)
    with memory.labelled("language model"):
        output = model.language_model(prompt_BQL, batch)
    with memory.labelled("lm"):
        return objective(output).loss


def run_step(
    model: nn.Module,
    loss: Callable[[Any, LiveMemory], Tensor],
    make_batch: Callable[[], Any],
    *,
    device: str = "cpu",
    autocast: torch.dtype | None = None,
    keep_gradients: bool = False,
    shard_gradients: bool = False,
    on_loss_known: Callable[[], object] = lambda: None,
) -> StepMemory:
    """Run forward and backward of one step in the middle of a training and count what it makes.

    Args:
        model: in training mode, real or fake.
        loss: of a batch; labels what it makes.
        make_batch: called inside the count.
        device: where all of it lies.
        autocast: number format, None for none.
        keep_gradients: a micro-batch that adds to gradients; else those of the step before live until the loss is
            known, as Lightning's `zero_grad` has it.
        shard_gradients: gradients leave at once (ZeRO), so that none are counted.
        on_loss_known: called between the passes, where `kept` is taken; for whoever measures in another way.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    memory = LiveMemory([*model.parameters(), *model.buffers()])
    with memory, _named_vision_encoder(model, memory):
        if not shard_gradients:
            for parameter in trainable:
                parameter.grad = torch.zeros_like(parameter)
                memory.watch(parameter.grad, GRADIENTS)
        with memory.labelled("batch"):
            batch = make_batch()
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            value = loss(batch, memory)
        kept, highest = dict(memory.alive), memory.peak
        on_loss_known()
        if not keep_gradients:
            model.zero_grad(set_to_none=True)

        def account(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if shard_gradients:
                parameter.grad = None
            else:
                memory.watch(parameter.grad, GRADIENTS)

        hooks: list[Any] = [
            parameter.register_post_accumulate_grad_hook(account)  # type: ignore[no-untyped-call]
            for parameter in trainable
        ]
        with memory.labelled("backward"):
            _backward(value)
        for hook in hooks:
            hook.remove()
    model.zero_grad(set_to_none=True)
    return StepMemory(kept, memory.peak, memory.peak is not highest)


def _backward(value: Tensor) -> None:
    # what `value.backward()` calls; it would switch function modes off, and recomputing activations needs them
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (value,), (torch.ones_like(value),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


@contextlib.contextmanager
def _named_vision_encoder(model: nn.Module, memory: LiveMemory) -> Iterator[None]:
    outside: list[str] = []

    def enter(*_: Any) -> None:
        outside.append(memory.label)
        memory.label = "vision encoder"

    def leave(*_: Any) -> None:
        memory.label = outside.pop()

    encoder = model.get_submodule("vision_encoder")
    hooks = [encoder.register_forward_pre_hook(enter), encoder.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
