"""LoRA on a frozen language model, by peft: (model, settings) -> small trainable matrices beside its linear layers.

Not in the paper, whose language model is frozen, nor in LAVIS's BLIP-2. An extra, off by default; the frozen weights
stay bit-identical, and the adapter's weights are the only ones of the language model that a checkpoint holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from blip2train.errors import ConfigError

_WHERE = "llm.model.lora"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """One low-rank adapter.

    Args:
        r: rank.
        alpha: the adapter's output is scaled by alpha / r.
        dropout: on the adapter's input, in training.
        target_modules: names of the linear layers that get one, or a regular expression over full names; None takes
            peft's choice for the architecture (most often the attention's query and value).
    """

    r: int
    alpha: float
    dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None


def add_lora(model: Any, settings: Mapping[str, Any]) -> None:
    """Put trainable adapters, float32, into a frozen transformers model, in place.

    A new adapter is the identity: its second matrix is zero.

    Raises:
        ConfigError: peft is not installed, a setting is unknown or impossible, or no layer has such a name.
    """
    chosen = _parse(settings)
    try:
        import peft  # an extra: nobody else pays for its import
    except ImportError as error:
        raise ConfigError(
            "LoRA needs peft, which is not installed", where=_WHERE, fix="pip install 'blip2train[lora]'"
        ) from error
    targets = chosen.target_modules
    try:
        config = peft.LoraConfig(
            r=chosen.r,
            lora_alpha=chosen.alpha,
            lora_dropout=chosen.dropout,
            target_modules=targets if targets is None or isinstance(targets, str) else list(targets),
        )
        peft.inject_adapter_in_model(config, model)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"no LoRA for {model.config.model_type}: {error}",
            where=_WHERE,
            fix=f"set {_WHERE}.target_modules; its linear layers are called {', '.join(_linear_names(model))}",
        ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            # peft takes the frozen layer's format; half precision would lose the updates
            parameter.data = parameter.data.float()


def train_adapters(model: nn.Module, mode: bool) -> None:
    """Set the training mode of adapters alone: their dropout is active in training, the frozen model's is not."""
    for name, module in model.named_modules():
        if "lora_" in name:
            module.train(mode)


def _parse(settings: Mapping[str, Any]) -> LoraSettings:
    known = [field.name for field in dataclasses.fields(LoraSettings)]
    unknown = sorted(set(settings) - set(known))
    absent = [name for name in ("r", "alpha") if name not in settings]
    if unknown or absent:
        found = [*(f"no {name}" for name in absent), *(f"unknown {name!r}" for name in unknown)]
        raise ConfigError(f"LoRA settings with {', '.join(found)}", where=_WHERE, fix=f"it takes {', '.join(known)}")
    return LoraSettings(**settings)


def _linear_names(model: nn.Module) -> list[str]:
    return sorted({name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
