"""What trains and what does not: freezing, counting, and the trainable part of a state dict.

The owner of a frozen part overrides its own `train(mode)`; nothing is monkey-patched as in LAVIS, and frozen parts are
always in eval mode (LAVIS leaves its LLM's dropout on in stage 2).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def freeze(module: nn.Module) -> None:
    """Take the module's parameters out of training and put it in eval mode."""
    module.requires_grad_(False)
    module.eval()


def trainable_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Detached tensors, by full name, of the parameters that train."""
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


_RESTORED = "restored_frozen_parameters"


def note_restored(module: nn.Module, names: Iterable[str]) -> None:
    """Remember frozen parameters whose values a checkpoint gave: building the model again would not bring them back."""
    setattr(module, _RESTORED, frozenset(names))


def checkpoint_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds: the parameters that train, and frozen ones that came from a checkpoint themselves."""
    restored: frozenset[str] = getattr(module, _RESTORED, frozenset())
    frozen = {name: parameter.detach() for name, parameter in module.named_parameters() if name in restored}
    return frozen | trainable_state_dict(module)


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of frozen parameters; shared ones count once."""
    counts = {True: 0, False: 0}
    for parameter in module.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return counts[True], counts[False]
