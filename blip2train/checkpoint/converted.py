"""A model of another library <-> a run folder that `evaluate run=` and `init_from=` read as one of our own.

Trainable weights lie in its checkpoint; what our own runs leave out (a frozen encoder that the source carries, tensors
we have no use for) lies in parts/, so that the way back to the source's format is lossless.

parts/vision_encoder.safetensors     the encoder under timm's names, in the source's number format
parts/language_model/                the language model as transformers reads it
parts/qformer_tokenizer/             the Q-Former's tokenizer
parts/extra.safetensors, extra.json  what only the source's format needs: tensors by its names, and facts
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from blip2train.checkpoint.find import find_checkpoint
from blip2train.checkpoint.io import WEIGHTS, disk_error, read_metadata, read_weights, save_weights
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir, read_json, write_json
from blip2train.weight_files import read_tensors

PARTS = "parts"
VISION = "vision_encoder.safetensors"
LANGUAGE_MODEL = "language_model"
QFORMER_TOKENIZER = "qformer_tokenizer"
EXTRA = "extra.safetensors"
FACTS = "extra.json"
REPORT = "conversion.json"
SHOWN = 3  # names in the summary; the file lists all
FREE_SPACE = "free some space or give another target=; nothing was left there"


@dataclass(slots=True)
class ConvertedModel:
    """Tensors and facts of a model on its way between two formats.

    Args:
        state: trainable weights by our parameter names, float32.
        vision: the whole vision encoder by timm's names, in the source's number format; empty where it has none.
        extra: tensors only the source's format knows, by its names.
        facts: what the way back needs besides tensors: "format", number formats, ...
        step: optimizer steps the source had taken, 0 where unknown.
    """

    state: dict[str, Tensor]
    vision: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    step: int = 0


@dataclass(slots=True)
class ConversionReport:
    """What a conversion did, printed and kept as conversion.json.

    Args:
        parts: tensors written, by part.
        kept_aside: tensors kept only for the way back.
        not_held: what the target's format cannot hold, each with the reason.
        notes: what a user of the target should know.
    """

    parts: dict[str, int] = field(default_factory=dict)
    kept_aside: list[str] = field(default_factory=list)
    not_held: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [f"  {part:<16}{count:>5} tensors" for part, count in self.parts.items()]
        if self.kept_aside:
            more = len(self.kept_aside) - SHOWN
            names = ", ".join(self.kept_aside[:SHOWN]) + (f" and {more} more" if more > 0 else "")
            lines.append(f"  {'kept aside':<16}{len(self.kept_aside):>5} tensors, for the way back: {names}")
        lines += [f"  not held: {item}" for item in self.not_held]
        lines += [f"  note: {item}" for item in self.notes]
        return "\n".join(lines)


def write_converted(folder: Path, model: ConvertedModel, *, stage: int, name: str) -> Path:
    """Write checkpoint and parts into a run folder (its config.yaml is the caller's); returns the checkpoint folder.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    checkpoint = RunDir(folder).checkpoints / f"step-{model.step:07d}"
    metadata = {"stage": stage, "name": name, "step": model.step}
    save_weights(model.state, checkpoint, metadata, fix=FREE_SPACE)
    if model.vision:
        save_tensors(model.vision, folder / PARTS / VISION)
    if model.extra:
        save_tensors(model.extra, folder / PARTS / EXTRA)
    if model.facts:
        write_json(folder / PARTS / FACTS, model.facts)
    return checkpoint


def read_converted(run: RunDir, checkpoint: str = "last") -> ConvertedModel:
    """Read a run folder, converted or trained here (then without parts).

    Raises:
        CheckpointError: no such checkpoint, or an unreadable file.
    """
    found = find_checkpoint(run, checkpoint)
    parts = run.path / PARTS
    return ConvertedModel(
        state=read_weights(found / WEIGHTS),
        vision=read_tensors(parts / VISION) if (parts / VISION).is_file() else {},
        extra=read_tensors(parts / EXTRA) if (parts / EXTRA).is_file() else {},
        facts=read_json(parts / FACTS) if (parts / FACTS).is_file() else {},
        step=int(read_metadata(found).get("step", 0)),
    )


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file as transformers and timm read it; tensors that share memory are written apart.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        start = whole.untyped_storage().data_ptr()
        # an element of a larger storage would be refused as well, so everything after the first is copied
        apart[name] = whole.clone() if start in seen else whole
        seen.add(start)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(apart, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise disk_error(error, path.parent, FREE_SPACE) from error


def write_atomically(
    target: Path, write: Callable[[Path], ConversionReport], *, only: str | None = None
) -> ConversionReport:
    """Let `write` fill a new folder; `target` appears only once that has succeeded, and on any error nothing is left.

    Args:
        target: the folder, or with `only` the file, to appear.
        write: fills the folder it is given.
        only: the one file of that folder that becomes `target`; conversion.json is put beside it.

    Raises:
        ConfigError: `target` holds something already, or a file is where a folder above it must be.
        CheckpointError: the disk is full or not writable.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigError("the target is in use", where=f"target={target}", fix="give a new name, or delete it first")
    files = [folder for folder in target.parents if folder.is_file()]
    if files:
        raise ConfigError(
            f"{files[0]} is a file, so no folder can be made in it",
            where=f"target={target}",
            fix="give a target in a folder",
        )
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    try:
        partial.mkdir(parents=True)
        report = write(partial)
        if target.is_dir():
            target.rmdir()
        if only is None:
            partial.rename(target)
        else:
            (partial / REPORT).rename(target.with_name(f"{target.stem}.{REPORT}"))
            (partial / only).rename(target)
    except OSError as error:
        raise disk_error(error, target.parent, FREE_SPACE) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report
