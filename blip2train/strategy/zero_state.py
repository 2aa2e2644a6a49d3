"""DeepSpeed's flat, partitioned AdamW state <-> whole tensors by parameter, and the norm of a partitioned gradient.

DeepSpeed's own checkpoints are a file per rank that no other strategy, and no other number of ranks, can read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from blip2train import distributed
from blip2train.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def whole_optimizer_state(zero: Any, positions: Sequence[nn.Parameter], scalars: Set[int]) -> dict[str, Any]:
    """What the wrapped AdamW's `state_dict()` would be without sharding.

    A collective; complete on rank 0, elsewhere without tensors.

    Args:
        zero: DeepSpeed's optimizer, of stage 1, 2 or 3.
        positions: all trained parameters, in the order of the optimizer's groups before sharding.
        scalars: `id` of those that `give_scalars_a_dimension` has changed.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    step = torch.tensor(float(next(iter(zero.optimizer.state.values()))["step"]))
    state: dict[int, dict[str, Any]] = {}
    for position, parameter in enumerate(positions):
        moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        if distributed.is_main():
            shape = () if id(parameter) in scalars else moments[MOMENTS[0]].shape
            state[position] = {"step": step.clone()} | {
                key: value.cpu().reshape(shape) for key, value in moments.items()
            }
    return {"state": state, "param_groups": _groups(zero, positions)}


def load_optimizer_state(zero: Any, positions: Sequence[nn.Parameter], saved: Mapping[str, Any]) -> None:
    """Fill the partitions from a whole state; no communication.

    Raises:
        CheckpointError: the state is of other parameters.
    """
    known = [len(group["params"]) for group in saved["param_groups"]]
    wanted = [len(group["params"]) for group in _groups(zero, positions)]
    if known != wanted:
        raise CheckpointError(
            f"optimizer groups of {known} parameters, this model has {wanted}",
            where="the trainer's state of the checkpoint",
            fix="continue with the settings of the run that wrote it",
        )
    for group, before in zip(zero.optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in before.items() if key != "params"})
    if not saved["state"]:
        return
    make_state(zero, step=float(next(iter(saved["state"].values()))["step"]))
    for position, entries in saved["state"].items():
        for key in MOMENTS:
            _fill(zero, positions[position], entries[key], key)


def gradient_norm(zero: Any) -> Tensor:
    """L2 norm over all partitions, after the backward pass and before the step; a collective.

    Infinite where any gradient is not finite.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups

    norm = zero.scaled_global_norm() if _flat(zero) is None else combine_grad_norm_groups(zero._get_norm_groups())
    return torch.as_tensor(norm / zero.loss_scale).detach().reshape(())


def _flat(zero: Any) -> list[Tensor] | None:
    """Stage 3's partitions; None under stages 1 and 2."""
    return getattr(zero, "fp32_partitioned_groups_flat", None)


def _groups(zero: Any, positions: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """The optimizer's groups with parameters by position."""
    where = {id(parameter): position for position, parameter in enumerate(positions)}
    groups = []
    members = zero.bit16_groups if _flat(zero) is None else _stage3_members(zero)
    for group, parameters in zip(zero.optimizer.param_groups, members, strict=True):
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append(settings | {"params": sorted(where[id(parameter)] for parameter in parameters)})
    return groups


def _stage3_members(zero: Any) -> list[list[nn.Parameter]]:
    """Stage 3 cuts a group into subgroups: put them together again."""
    members: list[list[nn.Parameter]] = [[] for _ in zero.optimizer.param_groups]
    for subgroup, parameters in enumerate(zero.fp16_groups):
        members[zero.sub_group_to_group_id[subgroup]] += parameters
    return members


def make_state(zero: Any, step: float) -> None:
    """What AdamW makes in its first step, for every partition: counter and moments, zero.

    To be called before that step too: DeepSpeed looks for the state of all groups once the first has been stepped,
    and never again.
    """
    inner, stage3 = zero.optimizer, _flat(zero)
    flats = zero.single_partition_of_fp32_groups if stage3 is None else stage3
    on_device = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    for flat in flats:
        counter = torch.tensor(step, device=flat.device if on_device else "cpu")
        inner.state[flat] = {"step": counter} | {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
    if stage3 is None:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _fill(zero: Any, parameter: nn.Parameter, whole: Tensor, key: str) -> None:
    if _flat(zero) is None:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, whole, key)
        return
    # DeepSpeed's own setter of stage 3 reads past the end where a parameter does not divide by the ranks
    piece, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    first = zero._get_param_partition_rank(parameter) * piece.numel()
    own = whole.flatten()[first : first + piece.numel()]
    piece[: own.numel()].copy_(own)
