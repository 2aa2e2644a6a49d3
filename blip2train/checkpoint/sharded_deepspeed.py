"""A folder that DeepSpeed ZeRO saved, a file or two per rank -> whole float32 tensors, by DeepSpeed's own tool.

Lightning's DeepSpeedStrategy writes FOLDER/latest and FOLDER/checkpoint/, DeepSpeed itself FOLDER/global_step100/.
DeepSpeed's tool unpickles whatever the files hold; here every file is read with torch's restricted reader, twice: once
to see whether the files belong together, and once inside the tool.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2train.checkpoint.sharded import ShardedCheckpoint, listed, only_inert, read_inert
from blip2train.errors import CheckpointError, ConfigError

LATEST = "latest"
_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_COPY = "copy the whole folder again from where it was written"
_OBJECTS = "save it again without objects of your own in hyperparameters or callbacks; their code would have to run"
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def find_deepspeed(source: Path) -> Path | None:
    """The folder with the files of one checkpoint: `source`, the one that its `latest` names, or its only one.

    None where there is no sign of DeepSpeed.

    Raises:
        CheckpointError: `latest` names no folder beside it, or there are several and nothing says which.
    """
    if _has_shards(source):
        return source
    inside = sorted(path for path in source.iterdir() if path.is_dir() and _has_shards(path))
    if (source / LATEST).is_file():
        tag = (source / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        named = source / tag
        if named not in inside:
            raise CheckpointError(
                f"{LATEST} names {tag[:80]!r}, which is no folder of DeepSpeed's beside it",
                where=str(source),
                fix=f"there are: {listed(path.name for path in inside) or 'none'}; give one as source=, or {_COPY}",
            )
        return named
    if len(inside) > 1:
        raise CheckpointError(
            f"{len(inside)} checkpoints, and no file {LATEST!r} to choose by",
            where=str(source),
            fix=f"give one of them as source=: {listed(str(path) for path in inside)}",
        )
    return inside[0] if inside else None


def read_deepspeed(folder: Path) -> ShardedCheckpoint:
    """Put a checkpoint of ZeRO 1 to 3 together.

    Args:
        folder: of the files, see `find_deepspeed`.

    Raises:
        ConfigError: DeepSpeed is not installed.
        CheckpointError: files are missing, damaged, of different runs or steps, or hold objects of other packages.
    """
    optim, model = _by_rank(folder, _OPTIM), _by_rank(folder, _MODEL)
    if not optim or not model:
        lacking = "optimizer states" if model else "model states"
        raise CheckpointError(
            f"no file of {lacking}, e.g. {'zero_pp_rank_0_' if model else ''}mp_rank_00_{lacking.split()[0][:5]}"
            "_states.pt, so this is no whole checkpoint of ZeRO",
            where=str(folder),
            fix=f"the float32 weights lie in both kinds of files: {_COPY}",
        )
    stage = _check_ranks(optim, folder)
    _check_model_ranks(model, len(optim) if stage == 3 else 1, folder)
    first = read_inert(model[0], fix=_OBJECTS)
    if not isinstance(first, Mapping) or not isinstance(first.get("module"), Mapping):
        raise CheckpointError("holds no DeepSpeed model", where=str(model[0]), fix=_COPY)
    for path in list(model.values())[1:]:
        read_inert(path, fix=_OBJECTS)
    state = _put_together(folder, [*optim.values(), *model.values()])
    if stage < 3:  # whole on every rank, and frozen weights nowhere else under stage 1
        whole = {name: item for name, item in first["module"].items() if isinstance(item, Tensor)}
        state = {**whole, **state}
    step = first.get("global_steps", 0)
    return ShardedCheckpoint(
        f"DeepSpeed ZeRO-{stage}", folder, state, len(optim), step if isinstance(step, int) else 0, ["optimizer state"]
    )


def _has_shards(folder: Path) -> bool:
    return any(kind.fullmatch(path.name) for path in folder.glob("*_states.pt") for kind in (_OPTIM, _MODEL))


def _by_rank(folder: Path, kind: re.Pattern[str]) -> dict[int, Path]:
    """Files of one kind by data-parallel rank.

    Raises:
        CheckpointError: the model itself was cut over devices, or two files are of one rank.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*_states.pt")):
        named = kind.fullmatch(path.name)
        if named is None:
            continue
        if int(named[2]):
            raise CheckpointError(
                f"{path.name}: a model cut over several devices (tensor parallel), which no model here was",
                where=str(folder),
                fix="give a checkpoint of data parallel training, ZeRO 1 to 3",
            )
        rank = int(named[1] or 0)
        if rank in found:
            raise CheckpointError(
                f"two files of rank {rank}: {found[rank].name}, {path.name}",
                where=str(folder),
                fix="they are of two checkpoints: keep those of one",
            )
        found[rank] = path
    return dict(sorted(found.items()))


def _check_ranks(files: Mapping[int, Path], folder: Path) -> int:
    """Whether the optimizer files are all of one checkpoint; returns its ZeRO stage."""
    facts = {rank: _facts(path) for rank, path in files.items()}
    worlds = {rank: world for rank, (_, world, _) in facts.items()}
    if len(set(worlds.values())) > 1:
        said = (f"{files[rank].name}: {world}" for rank, world in worlds.items())
        raise CheckpointError(
            f"files of runs with different numbers of ranks: {listed(said)}",
            where=str(folder),
            fix="an older checkpoint was written into the same folder: keep the files of one",
        )
    world = next(iter(worlds.values()))
    missing, surplus = sorted(set(range(world)) - set(files)), sorted(set(files) - set(range(world)))
    for what, ranks in (("no file", missing), ("a file too many", surplus)):
        if ranks:
            raise CheckpointError(
                f"written by {world} ranks; {what} of rank {listed(map(str, ranks))}",
                where=str(folder),
                fix=f"each machine writes the files of its own ranks: {_COPY}",
            )
    for what, place in (("ZeRO stages", 0), ("optimizer steps", 2)):
        if len({fact[place] for fact in facts.values()}) > 1:
            said = (f"{files[rank].name}: {fact[place]}" for rank, fact in facts.items())
            raise CheckpointError(
                f"files of different {what}: {listed(said)}",
                where=str(folder),
                fix=f"they do not belong together: {_COPY}",
            )
    return facts[0][0]


def _facts(path: Path) -> tuple[int, int, float | None]:
    """(ZeRO stage, ranks, optimizer step where it says) of one optimizer file."""
    content = read_inert(path, fix=_OBJECTS)
    zero = content.get("optimizer_state_dict") if isinstance(content, Mapping) else None
    if not isinstance(zero, Mapping) or not {"zero_stage", "partition_count"} <= zero.keys():
        raise CheckpointError(
            "holds no optimizer state of ZeRO", where=str(path), fix=f"{_COPY}; without ZeRO nothing is in shards"
        )
    stage, world = zero["zero_stage"], zero["partition_count"]
    world = max(world) if isinstance(world, list) and world else world
    if not isinstance(stage, int) or stage not in (1, 2, 3) or not isinstance(world, int):
        raise CheckpointError(f"of ZeRO stage {stage} and {world} ranks", where=str(path), fix="ZeRO 1, 2 or 3 is read")
    return stage, world, next(_steps(zero), None)


def _steps(zero: Mapping[str, Any]) -> Iterator[float]:
    inner = zero.get("base_optimizer_state") or zero.get("optimizer_state_dict")
    state = inner.get("state") if isinstance(inner, Mapping) else None
    for entries in state.values() if isinstance(state, Mapping) else ():
        if isinstance(entries, Mapping) and isinstance(entries.get("step"), int | float | Tensor):
            yield float(entries["step"])


def _check_model_ranks(files: Mapping[int, Path], wanted: int, folder: Path) -> None:
    missing = sorted(set(range(wanted)) - set(files))
    if missing or len(files) > wanted:
        raise CheckpointError(
            f"{len(files)} files of model states, {wanted} belong to this checkpoint"
            + (f"; missing of ranks {listed(map(str, missing))}" if missing else ""),
            where=str(folder),
            fix=_COPY,
        )


def _put_together(folder: Path, files: list[Path]) -> dict[str, Tensor]:
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "DeepSpeed is not installed, and its tool puts its checkpoints together",
            where=f"source={folder}",
            fix="pip install 'blip2train[deepspeed]'",
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it looks for a device and says so where it finds none
    with _quiet():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    try:
        with only_inert(files), _only_weights(), _quiet():
            state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    except Exception as error:  # whatever a file of the right outer form may lead its tool to
        raise CheckpointError(
            f"DeepSpeed cannot put it together: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            where=str(folder),
            fix=_COPY,
        ) from error
    return dict(state)


@contextlib.contextmanager
def _only_weights() -> Iterator[None]:
    """Make torch.load(weights_only=False), which DeepSpeed's tool calls, read without running code."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The tool prints its progress."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
