"""Tensor names -> where their first values came from, and what of a source found no place in the model.

Not in the paper. LAVIS loads BERT and its own checkpoints with `strict=False` and prints nothing; here a load that
leaves a tensor unexplained is an error, and the explanation goes to the run folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from torch import nn

from blip2train.errors import CheckpointError
from blip2train.model.freezing import trainable_state_dict

Origin: TypeAlias = Literal["bert", "copied", "checkpoint", "pretrained", "random"]
"""bert: read from a BERT. copied: of another tensor that was read from it. checkpoint: of a run. pretrained: the vision
encoder's own weights. random: the model's own first value, drawn or constant."""

ORIGINS: tuple[Origin, ...] = ("bert", "copied", "checkpoint", "pretrained", "random")


@dataclass(frozen=True, slots=True)
class InitReport:
    """Origin of every trained tensor; frozen ones appear only if a checkpoint filled them.

    Args:
        origins: tensor name -> where its first value came from.
        sources: origin -> the file, folder or hub name behind it.
        dropped: name in a source -> why no tensor took it.
        notes: tensor name -> what its origin does not say, for instance that some rows are random.
    """

    origins: Mapping[str, Origin]
    sources: Mapping[Origin, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def names(self, origin: Origin) -> list[str]:
        """Tensors of one origin, sorted."""
        return sorted(name for name, found in self.origins.items() if found == origin)

    def summary(self) -> str:
        """A short table: one row per part of the model, one column per origin that occurs."""
        columns = [origin for origin in ORIGINS if self.names(origin)]
        rows: dict[str, dict[str, int]] = {}
        for name, origin in self.origins.items():
            row = rows.setdefault(part_of(name), dict.fromkeys(columns, 0))
            row[origin] += 1
        width = max((len(part) for part in rows), default=0)
        lines = ["first value of every trained tensor, counted by part and origin"]
        lines.append("  " + " " * width + "".join(f"{column:>12}" for column in columns))
        for part, row in sorted(rows.items()):
            lines.append(f"  {part:<{width}}" + "".join(f"{row[column] or '-':>12}" for column in columns))
        lines += [f"  {origin}: {source}" for origin, source in self.sources.items()]
        lines += [f"  {name}: {note}" for name, note in sorted(self.notes.items())]
        for reason in dict.fromkeys(self.dropped.values()):
            count = sum(found == reason for found in self.dropped.values())
            lines.append(f"  left behind: {count} ({reason})")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Everything, for `init.json`."""
        return {
            "sources": dict(self.sources),
            "counts": self.counts(),
            "origins": dict(sorted(self.origins.items())),
            "notes": dict(sorted(self.notes.items())),
            "dropped": dict(sorted(self.dropped.items())),
        }

    def counts(self) -> dict[str, int]:
        """Number of tensors per origin that occurs."""
        return {origin: len(self.names(origin)) for origin in ORIGINS if self.names(origin)}


def report_random(model: nn.Module) -> InitReport:
    """The report of a model that read nothing: every trained tensor has its own first value."""
    return InitReport(dict.fromkeys(trainable_state_dict(model), "random"))


def report_part(model: nn.Module, part: str, report: InitReport) -> InitReport:
    """Make the report of one submodule that of the whole model; the rest of it has its own first values.

    Args:
        model: the whole.
        part: the submodule's name in it, for instance "qformer".
        report: with the submodule's own names.

    Raises:
        CheckpointError: the report leaves a trained tensor of the submodule out, or names one that it does not have.
    """
    check_complete(model.get_submodule(part), report)
    return replace(
        report,
        origins=report_random(model).origins | {f"{part}.{name}": origin for name, origin in report.origins.items()},  # type: ignore[operator]
        notes={f"{part}.{name}": note for name, note in report.notes.items()},
    )


def report_pretrained(report: InitReport, part: str) -> InitReport:
    """The same report, where what looked random under `part` came with the pretrained weights of that part."""
    origins: dict[str, Origin] = {
        name: "pretrained" if origin == "random" and name.startswith(f"{part}.") else origin
        for name, origin in report.origins.items()
    }
    return replace(report, origins=origins)


def check_complete(model: nn.Module, report: InitReport) -> None:
    """Every trained tensor has an origin, and every origin a tensor.

    Raises:
        CheckpointError: lists the tensors of which one of both is missing.
    """
    known = {name for name, _ in model.named_parameters()}
    surprises = [f"no origin: {name}" for name in trainable_state_dict(model) if name not in report.origins]
    surprises += [f"no such tensor: {name}" for name in report.origins if name not in known]
    if surprises:
        raise CheckpointError(
            f"{len(surprises)} tensors are not accounted for: {', '.join(surprises[:12])}",
            where="; ".join(report.sources.values()) or "the initial weights",
            fix="whoever adds a tensor to a part says where its first value comes from",
        )


def part_of(name: str) -> str:
    """A tensor's row in the table: its submodule, all blocks in one."""
    words = [word for word in name.split(".") if not re.fullmatch(r"\d+|weight|bias", word)]
    if words[0] in ("vision_encoder", "language_model"):
        return words[0]
    return ".".join(words[: words.index("blocks") + 2] if "blocks" in words else words[:2])
