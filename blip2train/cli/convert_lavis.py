"""LAVIS's `.pth` -> a run folder of ours, and back: the two directions of `convert` that concern LAVIS.

The file names no architecture, so the config does (experiment=, model overrides), and every size is checked against it.
LAVIS loads any file into any model and keeps quiet about what did not fit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from blip2train.cli import check
from blip2train.cli.convert import (
    LAVIS_FILE,
    card_source,
    language_model_name,
    load_strictly,
    model_config,
    vision_encoder_name,
    write_backbones,
    write_manifest,
    write_run_config,
)
from blip2train.cli.evaluate import load_run_config
from blip2train.errors import CheckpointError, ConfigError
from blip2train.run_dir import RunDir, read_json

if TYPE_CHECKING:
    from blip2train.checkpoint.converted import ConversionReport
    from blip2train.checkpoint.lavis import LavisModel

log = logging.getLogger(__name__)

LANGUAGE_MODELS = {"opt": "opt", "t5": "t5", "llama": "llm"}
"""transformers' model type -> LAVIS's prefix. LAVIS has no class for others."""

LN_VISION_EPS = 1e-5
BERT_BASE = {
    "hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 3072,
    "vocab_size": 30523, "max_positions": 512, "cross_attention_every": 2,
}  # fmt: skip
"""What LAVIS's Q-Former is built as: bert-base-uncased with [DEC]. Only the number of queries is free."""


def from_lavis(config: DictConfig, source: Path, folder: Path) -> ConversionReport:
    """Convert a LAVIS file into a run folder; `config` describes the model, as for `train`.

    Raises:
        ConfigError: the config describes no model.
        CheckpointError: an unreadable file, an unknown tensor, or a size other than the config's.
    """
    described = model_config(config)
    from blip2train.checkpoint.converted import ConversionReport, write_converted
    from blip2train.checkpoint.io import WEIGHTS
    from blip2train.checkpoint.lavis import describe
    from blip2train.checkpoint.lavis import from_lavis as take_apart
    from blip2train.checkpoint.lavis_file import find_lavis_file, read_lavis_file
    from blip2train.checkpoint.size_check import check_language_model, check_sizes, check_vision
    from blip2train.cli.meta import build_meta

    path = find_lavis_file(source)
    file = read_lavis_file(path)
    log.info("read %d tensors of %s", len(file.state), path.name)
    parts = take_apart(file.state, where=str(path))
    _check_kind(described, parts, path)
    meta = build_meta(described)
    check_sizes(parts.model.state, meta, where=str(path))
    check_vision(parts.model.vision, meta, where=str(path))
    check_language_model(parts.language_model, meta, where=str(path))
    trained = {name for name, parameter in meta.named_parameters() if parameter.requires_grad}
    vision = {f"vision_encoder.backbone.{name}": tensor for name, tensor in parts.model.vision.items()}
    parts.model.state |= {name: tensor.float() for name, tensor in vision.items() if name in trained}
    parts.model.step = file.step
    parts.model.facts |= {"file": path.name, "beside": file.facts}
    stage = check.stage_number(described)
    checkpoint = write_converted(folder, parts.model, stage=stage, name=described.name)
    load_strictly(meta, checkpoint / WEIGHTS, path)
    changes = write_backbones(folder, described, parts.language_model, vision=bool(parts.model.vision))
    write_run_config(folder, described, changes)
    write_manifest(folder, described.seed, meta, facts={"from": "lavis", "file": path.name, "steps": file.step})
    report = ConversionReport(describe(parts), list(parts.model.extra))
    report.not_held = [f"{name}: LAVIS's own state for resuming" for name in file.left_behind]
    if not parts.model.vision:
        report.notes.append(
            f"the file has no vision encoder: {described.model.vision_encoder.name} comes as configured"
        )
    return report


def to_lavis(config: DictConfig, source: Path, folder: Path) -> ConversionReport:
    """Convert a run folder into the file that LAVIS loads.

    Raises:
        ConfigError: no run, or a model for which LAVIS has no class.
        CheckpointError: a tensor that LAVIS has no name for.
    """
    run = RunDir.open(source, where="source=")
    trained = load_run_config(run)
    from blip2train.checkpoint.converted import LANGUAGE_MODEL, PARTS, ConversionReport, read_converted
    from blip2train.checkpoint.lavis import LavisModel
    from blip2train.checkpoint.lavis import to_lavis as put_together
    from blip2train.checkpoint.lavis_file import write_lavis_file
    from blip2train.weight_files import read_tensors

    model = read_converted(run, config.source_checkpoint)
    parts = LavisModel(model, kind=_language_model(trained), tower=_tower(trained))
    report = ConversionReport(notes=_differences(trained))
    _check_for_lavis(trained, parts, source)
    if parts.tower is None and model.vision:
        report.not_held.append(f"the vision encoder: LAVIS has no {trained.model.vision_encoder.name}")
        model.vision = {}
    weights = run.path / PARTS / LANGUAGE_MODEL / "model.safetensors"
    came_from_lavis = model.facts.get("format") == "lavis"
    if came_from_lavis and weights.is_file():
        parts.language_model = read_tensors(weights)
    elif parts.kind is not None and not came_from_lavis:
        report.not_held.append(f"the language model: LAVIS loads its own, as {parts.kind}_model")
    eps = trained.model.get("ln_vision_eps", LN_VISION_EPS)
    if eps != LN_VISION_EPS:
        report.not_held.append(f"ln_vision_eps {eps}: LAVIS's is {LN_VISION_EPS}, so its image tokens differ a little")
    state = put_together(parts, max_positions=trained.model.qformer.max_positions, where=str(source))
    write_lavis_file(state, folder / LAVIS_FILE)
    report.parts = {"model": len(state)}
    (folder / "README.md").write_text(_card(trained, run, model.step, report), encoding="utf-8")
    return report


def _check_kind(config: DictConfig, parts: LavisModel, path: Path) -> None:
    """The file's stage, language model and encoder family must be the config's."""
    stage = check.stage_number(config)
    kind = None if stage == 1 else _language_model(config)
    if parts.kind != kind:
        found = "stage 1" if parts.kind is None else f"stage 2 with {parts.kind}_proj"
        wanted = "stage 1" if kind is None else f"stage 2 with {kind}_proj"
        raise CheckpointError(
            f"the file is of {found}, the config describes {wanted}",
            where=str(path),
            fix="choose the experiment= of this file's stage and language model",
        )
    if parts.tower is not None and parts.tower != _tower(config):
        raise CheckpointError(
            f"the file holds LAVIS's {parts.tower} encoder, the config has {config.model.vision_encoder.name}",
            where=f"{path}, model.vision_encoder.name",
            fix="choose model/vision_encoder=eva_clip_g for eva, clip_vit_l for clip",
        )


def _language_model(config: DictConfig) -> str | None:
    """LAVIS's prefix of a config's language model; None in stage 1."""
    if check.stage_number(config) == 1:
        return None
    architecture = config.llm.get("architecture", None)
    local = Path(str(config.llm.path)) / "config.json"
    facts: Mapping[str, Any] = read_json(local) if local.is_file() else architecture or {}
    name = facts.get("model_type")
    if name not in LANGUAGE_MODELS:
        raise ConfigError(
            f"LAVIS has no BLIP-2 with a language model of type {name!r}",
            where="llm.path, llm.architecture",
            fix=f"LAVIS knows {', '.join(LANGUAGE_MODELS)}; to=huggingface holds any",
        )
    return LANGUAGE_MODELS[name]


def _tower(config: DictConfig) -> str | None:
    """Family of a config's encoder in LAVIS's terms, None for one that LAVIS does not have."""
    name = str(config.model.vision_encoder.name)
    if name.startswith("eva_giant_patch14"):
        return "eva"
    return "clip" if name.startswith("vit_") and "_clip_" in name else None


def _check_for_lavis(config: DictConfig, parts: LavisModel, source: Path) -> None:
    """Refuse what LAVIS would compute otherwise, or could not hold."""
    adapter = [name for name in parts.model.state if name.startswith("language_model.")]
    encoder = [name for name in parts.model.state if name.startswith("vision_encoder.")]
    problems = {
        "model.ln_vision is false, LAVIS always normalises the image tokens": not config.model.ln_vision,
        f"{len(adapter)} trained tensors of the language model, e.g. {adapter[:1]}": bool(adapter),
        f"a trained {config.model.vision_encoder.name}, which LAVIS does not have": bool(encoder) and not parts.tower,
    }
    found = [problem for problem, true in problems.items() if true]
    if found:
        raise CheckpointError(
            f"LAVIS cannot hold this model: {'; '.join(found)}",
            where=str(source),
            fix="to=huggingface may; or train with LAVIS's settings (experiment=lavis/...)",
        )


def _differences(config: DictConfig) -> list[str]:
    """Where LAVIS's classes differ from this model in size: it would have to be changed to load the file."""
    qformer = config.model.qformer
    other = [f"{key} {qformer[key]} (LAVIS: {value})" for key, value in BERT_BASE.items() if qformer[key] != value]
    notes = [f"LAVIS builds its Q-Former as bert-base-uncased; here {', '.join(other)}"] if other else []
    if _tower(config) is None:
        notes.append(f"LAVIS has no vision encoder {config.model.vision_encoder.name}")
    return notes


def _card(config: DictConfig, run: RunDir, step: int, report: ConversionReport) -> str:
    from blip2train.checkpoint.model_card import ModelCard

    backbones = {"vision encoder": vision_encoder_name(config)}
    if check.stage_number(config) == 2:
        backbones["language model"] = language_model_name(config)
    return ModelCard(
        name=str(config.name),
        stage=check.stage_number(config),
        format="lavis",
        source=card_source(run, config.name),
        steps=step,
        backbones=backbones,
        tensors=report.parts,
        not_held=report.not_held,
        notes=report.notes,
    ).text()
