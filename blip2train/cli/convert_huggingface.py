"""`blip2train convert from=huggingface to=blip2train`: a folder of transformers' Blip2 -> a run folder, complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from blip2train.checkpoint import huggingface_config as settings
from blip2train.checkpoint.converted import (
    LANGUAGE_MODEL,
    PARTS,
    QFORMER_TOKENIZER,
    ConversionReport,
    ConvertedModel,
    save_tensors,
    write_converted,
)
from blip2train.checkpoint.huggingface import NOT_HELD, STAGES, to_ours
from blip2train.checkpoint.huggingface import VISION as VISION_PREFIX
from blip2train.checkpoint.huggingface_folder import (
    CONFIG,
    GENERATION,
    PROCESSOR_FILES,
    SIDE_FACTS,
    SIDE_TENSORS,
    SOURCE_FILES,
    TOKENIZER_FILES,
    copy_files,
    read_image_processor,
    read_json_file,
)
from blip2train.checkpoint.huggingface_text import forget_image_token
from blip2train.checkpoint.size_check import check_sizes
from blip2train.cli.convert import write_manifest
from blip2train.cli.convert_huggingface_config import Source, describe_source, original_vocabulary, write_config
from blip2train.cli.convert_huggingface_out import to_huggingface
from blip2train.cli.evaluate import load_run_config
from blip2train.cli.meta import build_meta
from blip2train.errors import CheckpointError
from blip2train.model.freezing import trainable_state_dict
from blip2train.run_dir import RunDir, write_json
from blip2train.weight_files import in_folder, read_tensors, read_weights

__all__ = ["from_huggingface", "to_huggingface"]


def from_huggingface(config: DictConfig, source: Path, folder: Path) -> ConversionReport:
    """Convert a folder of `save_pretrained` into a run folder; see `cli.convert.Direction`.

    Raises:
        CheckpointError: another class, settings ours does not compute, a missing shard, tensors that do not fit.
        ConfigError: the experiment given describes another model.
    """
    raw = read_json_file(source / CONFIG)
    kind = settings.model_kind(raw, str(source / CONFIG))
    theirs = settings.read_config(raw, kind, str(source / CONFIG))
    described = describe_source(config, kind, theirs)
    side = read_json_file(source / SIDE_FACTS) if (source / SIDE_FACTS).is_file() else {}
    tensors = to_ours(read_weights(in_folder(source), where=str(source)), kind, str(source), side.get("eva"))
    read = Source(source, kind, raw, theirs, read_image_processor(source), side, tensors)
    report = ConversionReport(notes=[*settings.config_notes(theirs, kind)])
    report.notes += settings.processor_notes(read.processor, theirs.vision_config.image_size)
    model = _converted(read, report)
    _write_text_parts(read, folder, report)
    write_converted(folder, model, stage=STAGES[kind], name=described["name"])
    write_config(described, read, model, folder, report)
    built = _check_fits(RunDir(folder), model, read)
    facts = {"from": "huggingface", "file": source.name, "steps": model.step}
    write_manifest(folder, described["seed"], built, facts=facts)
    report.parts |= {"trainable": len(model.state), "vision encoder": len(model.vision)}
    report.kept_aside += sorted(model.extra)
    return report


def _converted(read: Source, report: ConversionReport) -> ConvertedModel:
    """Tensors in our form: trained ones in float32, with what the source lacks filled in, and the way back's facts."""
    tensors = read.tensors
    facts: dict[str, Any] = {"format": "huggingface", "kind": read.kind, "config": read.raw}
    trained = dict(tensors.trained)
    if (read.folder / SIDE_TENSORS).is_file():
        trained |= read_tensors(read.folder / SIDE_TENSORS)
    for name in read.side.get("trained_vision", []):
        trained[f"{VISION_PREFIX}{name}"] = tensors.vision[name]
    if read.kind == "retrieval":
        fresh = _initial_heads(read.config.qformer_config, trained)
        facts["invented"] = sorted(fresh)
        trained |= fresh
        if fresh:
            report.notes.append(
                "the source has no temperature and no [DEC] head: 0.07 and random weights were put in, so captions of "
                "this stage-1 model mean nothing before it is trained"
            )
    facts["dtypes"] = {
        name: settings.name_of(tensor.dtype) for name, tensor in trained.items() if tensor.dtype != torch.float32
    }
    state = {name: tensor.to(torch.float32) for name, tensor in trained.items()}
    step = int(read.side.get("step", 0))
    return ConvertedModel(state, tensors.vision, tensors.aside, facts, step)


def _initial_heads(qformer: Any, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """What stage 1 starts from for the parts transformers lacks: LAVIS's temperature, BERT's initial weights."""
    width, vocabulary = qformer.hidden_size, qformer.vocab_size
    generator = torch.Generator().manual_seed(0)
    initial = {
        "temperature": torch.tensor(0.07),
        "qformer.lm_head.dense.weight": torch.randn(width, width, generator=generator) * qformer.initializer_range,
        "qformer.lm_head.dense.bias": torch.zeros(width),
        "qformer.lm_head.norm.weight": torch.ones(width),
        "qformer.lm_head.norm.bias": torch.zeros(width),
        "qformer.lm_head.bias": torch.zeros(vocabulary),
    }
    assert set(initial) == set(NOT_HELD)
    return {name: tensor for name, tensor in initial.items() if name not in trained}


def _write_text_parts(read: Source, folder: Path, report: ConversionReport) -> None:
    """The language model or the Q-Former's tokenizer as transformers reads them, and the source's own side files."""
    parts = folder / PARTS
    copy_files(read.folder, parts / SOURCE_FILES, (*TOKENIZER_FILES, *PROCESSOR_FILES, GENERATION))
    own = parts / (LANGUAGE_MODEL if read.kind == "generation" else QFORMER_TOKENIZER)
    found = copy_files(read.folder, own, TOKENIZER_FILES)
    if not found:
        report.notes.append(
            "the source has no tokenizer files: give its path when converting (+llm.tokenizer.path=, stage 1: "
            "+tokenizer.path= with its vocab_size and dec_id), or put them into " + f"{PARTS}/{own.name}"
        )
    if read.kind != "generation":
        return
    state, text_config = original_vocabulary(read)
    if found and read.side.get("added_rows"):
        forget_image_token(own)
    save_tensors(state, own / "model.safetensors")
    write_json(own / CONFIG, text_config)
    report.parts["language model"] = len(state)


def _check_fits(run: RunDir, model: ConvertedModel, read: Source) -> nn.Module:
    """Build the described model on the meta device and compare every name and shape with what was written.

    Returns:
        The model, for its counts.

    Raises:
        CheckpointError: lists what is missing, surplus or of another shape.
    """
    built = build_meta(load_run_config(run))
    own = (
        "config.json and the weights are of two models: take both from one folder, or correct the sizes in config.json"
    )
    check_sizes(model.state, built, where=str(read.folder), fix=own)
    encoder = built.get_submodule("vision_encoder.backbone")
    problems = _differences(trainable_state_dict(built), model.state, set())
    problems += [f"vision encoder: {item}" for item in _differences(encoder.state_dict(), model.vision, set())]
    if read.kind == "generation":
        language_model: Any = built.get_submodule("language_model.model")
        tied = set(language_model.all_tied_weights_keys)
        state = original_vocabulary(read)[0]
        problems += [f"language model: {item}" for item in _differences(language_model.state_dict(), state, tied)]
    if problems:
        raise CheckpointError(
            f"{len(problems)} tensors are not those of the model that config.json describes:\n    "
            + "\n    ".join(problems[:12]),
            where=str(read.folder),
            fix="download the folder again; nothing was written",
        )
    return built


def _differences(wanted: dict[str, Tensor], found: dict[str, Tensor], optional: set[str]) -> list[str]:
    problems = [f"missing: {name}" for name in wanted if name not in found and name not in optional]
    problems += [f"unexpected: {name}" for name in found if name not in wanted]
    problems += [
        f"{name}: {tuple(found[name].shape)}, wanted {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    return problems
