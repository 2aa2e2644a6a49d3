"""Trainable parameters -> groups with and without weight decay.

The paper gives one number (0.05, section 3.4) and no rule. LAVIS decays everything that is not one-dimensional: also
embeddings, the query tokens and the temperature, which decay pulls towards division by zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from blip2train.errors import ConfigError

NoDecay = Literal["paper", "lavis"]


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters that share a weight decay; `parameters` are (qualified name, parameter) in module order."""

    name: str
    weight_decay: float
    parameters: tuple[tuple[str, nn.Parameter], ...]

    @property
    def num_parameters(self) -> int:
        """Count of scalars."""
        return sum(parameter.numel() for _, parameter in self.parameters)

    def to_optimizer(self) -> dict[str, Any]:
        """The dictionary that `torch.optim` takes; the name survives in the optimizer's state."""
        return {
            "name": self.name,
            "params": [parameter for _, parameter in self.parameters],
            "weight_decay": self.weight_decay,
        }


def group_parameters(module: nn.Module, weight_decay: float, no_decay: NoDecay = "paper") -> list[ParamGroup]:
    """Split what requires a gradient into "decay" and "no_decay"; an empty group is left out, a tied weight comes once.

    Args:
        module: the model; frozen parameters are skipped.
        weight_decay: of the group "decay".
        no_decay: "paper" exempts biases, norms, embeddings (tied heads with them) and bare parameters, which are the
            query tokens, the temperature, class tokens and position tables: only the weight matrices of layers decay.
            "lavis" exempts one-dimensional parameters and biases alone.

    Raises:
        ConfigError: nothing requires a gradient, or `no_decay` is unknown.
    """
    if no_decay not in ("paper", "lavis"):
        raise ConfigError(f"no_decay is {no_decay!r}", where="optim.no_decay", fix='"paper" or "lavis"')
    trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError(
            "no parameter requires a gradient", where=type(module).__name__, fix="unfreeze what is to be trained"
        )
    decaying = _weight_matrices(module) if no_decay == "paper" else _not_one_dimensional(module)
    groups = (
        ParamGroup("decay", weight_decay, tuple(item for item in trainable if id(item[1]) in decaying)),
        ParamGroup("no_decay", 0.0, tuple(item for item in trainable if id(item[1]) not in decaying)),
    )
    return [group for group in groups if group.parameters]


def summarize(groups: list[ParamGroup]) -> str:
    """One line per group for a person: tensors, scalars, decay and the first names."""
    lines = []
    for group in groups:
        names = ", ".join(name for name, _ in group.parameters[:3])
        more = ", ..." if len(group.parameters) > 3 else ""
        lines.append(
            f"{group.name:<9} weight decay {group.weight_decay:<6g} {len(group.parameters):>4} tensors "
            f"{group.num_parameters:>13,} parameters  ({names}{more})"
        )
    return "\n".join(lines)


def _weight_matrices(module: nn.Module) -> set[int]:
    embeddings = {
        id(parameter)
        for owner in module.modules()
        if isinstance(owner, (nn.Embedding, nn.EmbeddingBag))
        for parameter in owner.parameters(recurse=False)
    }
    # a layer's matrix is called "weight" ("in_proj_weight" in torch's own attention); a bare parameter is not
    return {
        id(parameter)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.ndim >= 2 and name.endswith("weight") and id(parameter) not in embeddings
    }


def _not_one_dimensional(module: nn.Module) -> set[int]:
    return {id(item) for name, item in module.named_parameters() if item.ndim != 1 and not name.endswith(".bias")}
