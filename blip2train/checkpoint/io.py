"""Trainable weights <-> one safetensors file with metadata, strict, with a report of every key.

A checkpoint holds what was trained and nothing else: a stage-2 checkpoint must not contain an 11B language model.
LAVIS loads with `strict=False` and never prints what was missing; here a surprise is an error.
"""

from __future__ import annotations

import errno
import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blip2train.checkpoint.verify import METADATA as METADATA
from blip2train.checkpoint.verify import TRAINER_STATE as TRAINER_STATE
from blip2train.checkpoint.verify import WEIGHTS as WEIGHTS
from blip2train.checkpoint.verify import seal
from blip2train.errors import CheckpointError
from blip2train.model.freezing import checkpoint_state_dict, note_restored, trainable_state_dict
from blip2train.model.init_report import InitReport, Origin
from blip2train.run_dir import free_bytes, read_json

FORMAT_VERSION = 1

STAGE1_ONLY = (
    "vision_proj.*",
    "text_proj.*",
    "itm_head.*",
    "temperature",
    "qformer.*text*",
    "qformer.lm_head.*",
)
"""What stage 2 leaves behind: the contrastive, matching and generation heads and the Q-Former's text branch."""

STAGE2_ONLY = ("projection.*", "language_model.*.lora_*")
"""What stage 2 starts anew: the projection into the language model, and that model's adapter if it has one."""

OWN_WEIGHTS = ("vision_encoder.*",)
"""What a new run may train that the run before it left frozen: it starts from its own pretrained weights."""


KEEP_TRAINING = (
    "free some space: the checkpoints before are intact, and the same command goes on from the last one; "
    "or give another run_dir= with resume= this run folder"
)


def save_checkpoint(module: nn.Module, folder: Path, metadata: Mapping[str, Any]) -> Path:
    """Write the trainable weights of `module` and their metadata into `folder`; returns the weights file.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    return save_weights(checkpoint_state_dict(module), folder, metadata)


def save_weights(
    state: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, Any], *, fix: str = KEEP_TRAINING
) -> Path:
    """Write trainable weights by our parameter names, as `save_checkpoint` does; a converter has no module at hand.

    What already lies in the folder (the trainer's state) is sealed with them: metadata.json is the last file written.

    Args:
        state: by parameter name.
        folder: of the checkpoint.
        metadata: facts to keep with them.
        fix: what to do when the disk is full.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    facts = {
        "format_version": FORMAT_VERSION,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        **metadata,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"blip2train": json.dumps(facts)})
        seal(folder, facts)
    except (OSError, SafetensorError) as error:
        raise disk_error(error, folder, fix) from error
    return folder / WEIGHTS


def disk_error(error: Exception, folder: Path, fix: str = KEEP_TRAINING) -> CheckpointError:
    """Turn a failed write into an error that says how much room there is."""
    free = free_bytes(folder)
    full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error)
    cause = "the disk is full" if full else f"writing failed ({error})"
    return CheckpointError(
        f"could not write a checkpoint: {cause}; {free / 1e6:.0f} MB free",
        where=str(folder),
        fix=fix,
    )


def read_metadata(folder: Path) -> dict[str, Any]:
    """Facts of a checkpoint folder: stage, step, parameters, format version."""
    return read_json(folder / METADATA)


def load_weights(
    module: nn.Module, weights: Path, *, leave: Sequence[str] = (), fresh: Sequence[str] = ()
) -> InitReport:
    """Copy a weights file into the parameters of `module`, strictly; nothing is written if anything does not fit.

    Args:
        module: receives the weights. A frozen parameter is written only if the file holds it: a vision encoder that
            was trained in stage 1 and is frozen now. Checkpoints of `module` hold it from then on.
        weights: safetensors file written by `save_checkpoint`.
        leave: patterns of keys in the file that may find no place in the module.
        fresh: patterns of trainable parameters that the file may lack.

    Returns:
        Origin "checkpoint" for what was loaded, "random" for what the file lacks.

    Raises:
        CheckpointError: a key is unexpected, missing or of another shape; lists all of them.
    """
    if not weights.is_file():
        raise CheckpointError(
            "no such weights file", where=str(weights), fix="give a run folder that holds a checkpoint"
        )
    state = read_weights(weights)
    own = {name: parameter.detach() for name, parameter in module.named_parameters()}
    dropped = sorted(name for name in state if name not in own)
    missing = [name for name in trainable_state_dict(module) if name not in state]
    loaded = [name for name in own if name in state]
    problems = [f"unexpected in the file: {name}" for name in dropped if not matches(name, leave)]
    problems += [f"missing from the file: {name}" for name in missing if not matches(name, fresh)]
    problems += [
        f"{name}: the file has {tuple(state[name].shape)}, the model {tuple(own[name].shape)}"
        for name in loaded
        if state[name].shape != own[name].shape
    ]
    if problems:
        shown = "\n    ".join(problems[:12])
        more = f"\n    ... and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(
            f"{len(problems)} of {len({*state, *loaded, *missing})} tensors do not fit:\n    {shown}{more}",
            where=str(weights),
            fix="build the model with the settings of the run that wrote the file (its config.yaml lies above it)",
        )
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(state[name])
    note_restored(module, (name for name in loaded if not module.get_parameter(name).requires_grad))
    origins: dict[str, Origin] = {name: "checkpoint" if name in state else "random" for name in [*loaded, *missing]}
    return InitReport(origins, {"checkpoint": str(weights)}, dict.fromkeys(dropped, "no place in this stage"))


def read_weights(weights: Path) -> dict[str, Tensor]:
    """All tensors of a weights file that `save_weights` wrote.

    Raises:
        CheckpointError: not a readable file, or of a newer format.
    """
    try:
        with safe_open(weights, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("blip2train", "{}"))
            if facts.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
                raise CheckpointError(
                    f"written in format {facts['format_version']}, this version reads up to {FORMAT_VERSION}",
                    where=str(weights),
                    fix="upgrade blip2train",
                )
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(
            f"not a readable safetensors file ({error})", where=str(weights), fix="use an older checkpoint of the run"
        ) from error


def read_names(weights: Path) -> list[str]:
    """Names of the tensors in a weights file; CheckpointError if it cannot be read."""
    try:
        with safe_open(weights, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"not a readable safetensors file ({error})", where=str(weights), fix="use an older checkpoint of the run"
        ) from error


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter name fits one of the shell-style patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
