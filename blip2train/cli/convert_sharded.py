"""A checkpoint in shards -> a run folder of ours: `blip2train convert from=sharded to=blip2train`.

Plain Lightning's DeepSpeed and FSDP2 strategies write such folders, ours does not. As a LAVIS file, one names no
architecture: the config does (experiment=, model overrides), and every name and size is checked against it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from blip2train.cli import check
from blip2train.cli.convert import load_strictly, model_config, write_backbones, write_manifest, write_run_config
from blip2train.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from blip2train.checkpoint.converted import ConversionReport
    from blip2train.checkpoint.sharded import ShardedCheckpoint

log = logging.getLogger(__name__)

VISION = "vision_encoder.backbone."
LANGUAGE_MODEL = "language_model.model."
NOT_CARRIED = (
    "optimizer state, schedule and data position: train with init_from= this run; resume= needs what only a checkpoint "
    "of blip2train's own training has"
)


@dataclass(slots=True)
class _Parts:
    """Where the tensors of a file go; `vision` and `language_model` are whole or empty, by their libraries' names."""

    state: dict[str, Tensor] = field(default_factory=dict)
    vision: dict[str, Tensor] = field(default_factory=dict)
    language_model: dict[str, Tensor] = field(default_factory=dict)
    not_held: list[str] = field(default_factory=list)


def from_sharded(config: DictConfig, source: Path, folder: Path) -> ConversionReport:
    """Put a checkpoint in shards together as a run folder; `config` describes the model, as for `train`.

    Raises:
        ConfigError: the config describes no model, or DeepSpeed is needed and not installed.
        CheckpointError: no such folder, files that are missing, damaged or do not belong together, or a tensor whose
            name or size is not the config's.
    """
    described = model_config(config)
    from blip2train.checkpoint.converted import ConversionReport, ConvertedModel, write_converted
    from blip2train.checkpoint.io import WEIGHTS
    from blip2train.checkpoint.sharded import own_names
    from blip2train.checkpoint.size_check import check_language_model, check_sizes, check_vision
    from blip2train.cli.meta import build_meta

    found = read_sharded(source)
    where = str(found.where)
    log.info("read %d tensors, %s of %d ranks", len(found.state), found.kind, found.ranks)
    meta = build_meta(described)
    parts = _take_apart(own_names(found.state, where=where), meta)
    check_sizes(parts.state, meta, where=where)
    check_vision(parts.vision, meta, where=where)
    check_language_model(parts.language_model, meta, where=where)
    facts = {"format": "sharded", "kind": found.kind, "ranks": found.ranks}
    model = ConvertedModel(parts.state, parts.vision, facts=facts, step=found.step)
    checkpoint = write_converted(folder, model, stage=check.stage_number(described), name=described.name)
    load_strictly(meta, checkpoint / WEIGHTS, found.where)
    changes = write_backbones(folder, described, parts.language_model, vision=bool(parts.vision))
    write_run_config(folder, described, changes)
    origin = {"from": "sharded", "file": source.resolve().name, "steps": found.step}
    write_manifest(folder, described.seed, meta, facts=origin)
    counts = {"trained": parts.state, "vision encoder": parts.vision, "language model": parts.language_model}
    report = ConversionReport({part: len(tensors) for part, tensors in counts.items() if tensors})
    report.not_held = [NOT_CARRIED, *parts.not_held]
    report.not_held += [f"{name}: the trainer's own" for name in found.left_behind if not name.startswith("optim")]
    report.notes = [f"{found.kind}, written by {found.ranks} ranks after {found.step or 'an unknown number of'} steps"]
    if not parts.vision:
        report.notes.append(f"no whole vision encoder in it: {described.model.vision_encoder.name} comes as configured")
    return report


def read_sharded(source: Path) -> ShardedCheckpoint:
    """Find out what wrote a folder of shards, and put it together.

    Raises:
        ConfigError: DeepSpeed is needed and not installed.
        CheckpointError: neither kind of folder, or not a whole one.
    """
    from blip2train.checkpoint.sharded_dcp import METADATA, find_dcp, read_dcp
    from blip2train.checkpoint.sharded_deepspeed import find_deepspeed, read_deepspeed

    if not source.is_dir():
        raise CheckpointError("a file, not a folder: it is whole already", where=f"source={source}", fix=_WHOLE)
    folder = find_dcp(source)
    if folder is not None:
        return read_dcp(folder)
    folder = find_deepspeed(source)
    if folder is not None:
        return read_deepspeed(folder)
    if (source / "config.yaml").is_file() and (source / "checkpoints").is_dir():
        raise CheckpointError("a run folder of ours: its checkpoints are whole", where=f"source={source}", fix=_WHOLE)
    raise CheckpointError(
        f"no checkpoint in shards: neither {METADATA} and *.distcp nor *_optim_states.pt and *_model_states.pt",
        where=f"source={source}",
        fix="give the folder that holds these files, or for DeepSpeed the one above it, with the file 'latest'",
    )


_WHOLE = "train, evaluate and init_from= read runs of ours as they are; from=lavis and from=huggingface read others"


def _take_apart(state: Mapping[str, Tensor], model: nn.Module) -> _Parts:
    """Trained weights in float32; frozen backbones as they are, where the file has all of one.

    Of a frozen encoder that is there in part, what is there stays with the trained weights, as in a checkpoint that
    has restored it. What the model does not know stays too: loading names it.
    """
    known = dict(model.named_parameters())
    trained = {name for name, parameter in known.items() if parameter.requires_grad}
    parts = _Parts()
    rest = {name: _in_shape(tensor, known.get(name)) for name, tensor in state.items()}
    of_vision = [name for name in model.state_dict() if name.startswith(VISION)]
    if of_vision and all(name in rest for name in of_vision):
        parts.vision = {name.removeprefix(VISION): tensor for name, tensor in rest.items() if name.startswith(VISION)}
        rest = {name: tensor for name, tensor in rest.items() if name in trained or not name.startswith(VISION)}
    frozen = {name for name in rest if name.startswith(LANGUAGE_MODEL) and name not in trained}
    if frozen and frozen >= {name for name in known if name.startswith(LANGUAGE_MODEL)}:
        parts.language_model = {name.removeprefix(LANGUAGE_MODEL): rest[name] for name in frozen}
    elif frozen:
        parts.not_held.append(f"{len(frozen)} frozen tensors of the language model: it comes as configured")
    buffers = sorted((set(model.state_dict()) - known.keys() - frozen) & rest.keys())
    if buffers:
        parts.not_held.append(f"{len(buffers)} buffers, which are computed: {', '.join(buffers[:4])}")
    parts.state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in rest.items()
        if name not in frozen and name not in buffers
    }
    return parts


def _in_shape(tensor: Tensor, parameter: Tensor | None) -> Tensor:
    """A scalar has one dimension in shards: nothing else can be cut."""
    one = parameter is not None and parameter.dim() == 0 and tuple(tensor.shape) == (1,)
    return tensor.reshape(()) if one else tensor
