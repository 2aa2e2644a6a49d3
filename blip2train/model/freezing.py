"""What trains and what does not: freezing, counting, and the trainable part of a state dict.

The owner of a frozen part overrides its own `train(mode)`; nothing is monkey-patched as in LAVIS, and frozen parts are
always in eval mode (LAVIS leaves its LLM's dropout on in stage 2).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from blip2train.model.sharding import scalar_names, whole_tensor


def freeze(module: nn.Module) -> None:
    """Take the module's parameters out of training and put it in eval mode."""
    module.requires_grad_(False)
    module.eval()


def trainable_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Detached tensors, by full name, of the parameters that train."""
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


_KEPT = "frozen_parameters_of_the_checkpoint"


def note_restored(module: nn.Module, names: Iterable[str]) -> None:
    """Remember frozen parameters whose values a checkpoint gave: building the model again would not bring them back."""
    setattr(module, _KEPT, _kept(module) | frozenset(names))


def set_aside(module: nn.Module, names: Iterable[str]) -> None:
    """Take parameters out of training that no loss reaches; checkpoints hold them as before.

    Their modules keep their mode: nothing random may change for the others.
    """
    chosen = frozenset(names)
    for name in chosen:
        module.get_parameter(name).requires_grad_(False)
    note_restored(module, chosen)


def checkpoint_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds, whole: the parameters that train, those set aside, and restored ones.

    A collective where FSDP2 has sharded `module`: call it on all ranks. DeepSpeed's strategy has its own.
    """
    scalars = scalar_names(module)
    state = {name: whole_tensor(module.get_parameter(name).detach()) for name in checkpoint_names(module)}
    return {name: tensor.reshape(()) if name in scalars else tensor for name, tensor in state.items()}


def checkpoint_names(module: nn.Module) -> list[str]:
    """Names of what a checkpoint holds, in the order of the module."""
    kept = _kept(module)
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad or name in kept]


def _kept(module: nn.Module) -> frozenset[str]:
    names: frozenset[str] = getattr(module, _KEPT, frozenset())
    return names


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of frozen parameters; shared ones count once."""
    counts = {True: 0, False: 0}
    for parameter in module.parameters():
        # ZeRO-3 leaves an empty tensor behind, with the true size beside it
        counts[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    return counts[True], counts[False]
