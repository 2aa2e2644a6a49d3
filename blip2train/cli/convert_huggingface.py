"""`blip2train convert from=huggingface to=blip2train`: a folder of transformers' Blip2 -> a run folder, complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from blip2train.checkpoint import huggingface_config as settings
from blip2train.checkpoint.converted import (
    LANGUAGE_MODEL,
    PARTS,
    QFORMER_TOKENIZER,
    VISION,
    ConversionReport,
    ConvertedModel,
    save_tensors,
    write_converted,
)
from blip2train.checkpoint.huggingface import NOT_HELD, STAGES, Kind, Tensors, is_eva, to_ours
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
    load_tokenizer,
    read_image_processor,
    read_json_file,
)
from blip2train.checkpoint.huggingface_text import end_note, forget_image_token, tokenizer_settings
from blip2train.checkpoint.size_check import check_sizes
from blip2train.cli.check import stage_number
from blip2train.cli.config import compose, resolved_yaml
from blip2train.cli.convert import OWN_KEYS, write_manifest
from blip2train.cli.convert_huggingface_out import to_huggingface
from blip2train.cli.evaluate import load_run_config
from blip2train.cli.meta import build_meta
from blip2train.data.tokenizer import QFormerTokenizer
from blip2train.errors import CheckpointError, ConfigError
from blip2train.model.freezing import trainable_state_dict
from blip2train.run_dir import RunDir, write_json
from blip2train.weight_files import in_folder, read_tensors, read_weights

__all__ = ["from_huggingface", "to_huggingface"]

RUN_DIR = "/run_dir_of_a_converted_model"  # stands for the folder until the config is resolved
NAMES: dict[Kind, str] = {"retrieval": "huggingface_stage1", "generation": "huggingface_stage2"}
PAPER_STEPS = {1: 250_000, 2: 80_000}  # paper, section 3.4; a converted run states a training nobody starts by itself


@dataclass(slots=True)
class Source:
    """A folder of transformers, read: the settings as transformers fills them in, and all tensors."""

    folder: Path
    kind: Kind
    raw: dict[str, Any]
    config: Any
    processor: dict[str, Any]
    side: dict[str, Any]
    tensors: Tensors


def from_huggingface(config: DictConfig, source: Path, folder: Path) -> ConversionReport:
    """Convert a folder of `save_pretrained` into a run folder; see `cli.convert.Direction`.

    Raises:
        CheckpointError: another class, settings ours does not compute, a missing shard, tensors that do not fit.
        ConfigError: the experiment given describes another model.
    """
    raw = read_json_file(source / CONFIG)
    kind = settings.model_kind(raw, str(source / CONFIG))
    theirs = settings.read_config(raw, kind, str(source / CONFIG))
    described = _described(config, kind, theirs)
    side = read_json_file(source / SIDE_FACTS) if (source / SIDE_FACTS).is_file() else {}
    tensors = to_ours(read_weights(in_folder(source), where=str(source)), kind, str(source), side.get("eva"))
    read = Source(source, kind, raw, theirs, read_image_processor(source), side, tensors)
    report = ConversionReport(notes=[*settings.config_notes(theirs, kind)])
    report.notes += settings.processor_notes(read.processor, theirs.vision_config.image_size)
    model = _converted(read, report)
    _write_text_parts(read, folder, report)
    write_converted(folder, model, stage=STAGES[kind], name=described["name"])
    _write_config(described, read, model, folder, report)
    built = _check_fits(RunDir(folder), model, read)
    facts = {"from": "huggingface", "file": source.name, "steps": model.step}
    write_manifest(folder, described["seed"], built, facts=facts)
    report.parts |= {"trainable": len(model.state), "vision encoder": len(model.vision)}
    report.kept_aside += sorted(model.extra)
    return report


def _described(config: DictConfig, kind: Kind, theirs: Any) -> dict[str, Any]:
    """The config to start from: the user's experiment, which must describe this model, or a plain one of its stage."""
    stage = STAGES[kind]
    if config.get("model") is None:
        groups = [f"stage=stage{stage}", f"model=blip2_stage{stage}", f"data=stage{stage}", f"optim=adamw_stage{stage}"]
        groups += ["data/tokenizer=bert_base_uncased", f"trainer.max_steps={PAPER_STEPS[stage]}", f"name={NAMES[kind]}"]
        standard: Any = OmegaConf.to_container(compose("train", groups), resolve=False)
        # which language model it is, the source says
        base = OmegaConf.create(standard | {"llm": standard.get("llm", {}) | {"model": {}, "tokenizer": {}}})
        plain: Any = OmegaConf.to_container(compose("convert", []), resolve=False)
        given = _given(OmegaConf.to_container(config, resolve=False), plain)
        base.merge_with({key: value for key, value in given.items() if key not in OWN_KEYS})
        whole: Any = OmegaConf.to_container(base, resolve=False)
        return dict(whole)
    if stage_number(config) != stage:
        raise ConfigError(
            f"the experiment is of stage {stage_number(config)}, the source a stage-{stage} model ({kind})",
            where="experiment=",
            fix=f"give a stage-{stage} experiment, or none: the source says what it is",
        )
    wanted = settings.qformer_settings(theirs)
    compared = ("hidden_size", "num_layers", "num_heads", "num_queries", "intermediate_size", "image_dim")
    differing = [
        f"{key}: the source has {wanted[key]}, the experiment {config.model.qformer[key]}"
        for key in compared
        if config.model.qformer[key] != wanted[key]
    ]
    if differing:
        raise ConfigError(
            "the experiment describes another Q-Former:\n    " + "\n    ".join(differing),
            where="experiment=, model.qformer, model.vision_encoder",
            fix="give the experiment of this model, or none: the source says what it is",
        )
    described: Any = OmegaConf.to_container(config, resolve=False)
    return {key: value for key, value in described.items() if key not in (*OWN_KEYS, "hydra")}


def _given(config: Any, plain: Any) -> dict[str, Any]:
    """What a user has set or added on the command line: where a config differs from the plain one."""
    return {
        key: _given(value, plain[key]) if isinstance(value, dict) and isinstance(plain.get(key), dict) else value
        for key, value in config.items()
        if key not in plain or value != plain[key]
    }


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
    state, text_config = _original_vocabulary(read)
    if found and read.side.get("added_rows"):
        forget_image_token(own)
    save_tensors(state, own / "model.safetensors")
    write_json(own / CONFIG, text_config)
    report.parts["language model"] = len(state)


def _original_vocabulary(read: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The language model without what an earlier export had to add for <image>."""
    text_config = read.config.text_config.to_dict()
    state = dict(read.tensors.language_model)
    added: dict[str, int] = read.side.get("added_rows", {})
    for name, rows in added.items():
        if name in state:
            state[name] = state[name][:rows].clone()
    return state, text_config | read.side.get("text_config", {})


def _write_config(
    described: dict[str, Any], read: Source, model: ConvertedModel, folder: Path, report: ConversionReport
) -> None:
    """config.yaml: the experiment's, with the source's sizes and the folder's own parts."""
    described |= {"run_dir": RUN_DIR, "init_from": None, "init_qformer": None, "expected_global_batch": None}
    parts = "${run_dir}/" + PARTS
    dtype = _format(list(model.vision.values()))
    encoder = settings.vision_settings(read.config, read.processor, dtype, eva=is_eva(model.vision))
    encoder |= {"weights": f"{parts}/{VISION}"} | read.side.get("vision_encoder", {})
    network = described["model"]
    network["vision_encoder"] = encoder
    network["qformer"] |= settings.qformer_settings(read.config)
    network |= {"ln_vision": True, "ln_vision_eps": read.config.vision_config.layer_norm_eps}
    network |= {key: read.side[key] for key in ("ln_vision_eps",) if key in read.side}
    if read.kind == "retrieval":
        network["contrastive_dim"] = read.config.image_text_hidden_size
        _describe_qformer_tokenizer(described, folder)
    else:
        described["llm"] = _language_model(described.get("llm") or {}, read, folder, report)
    text = resolved_yaml(OmegaConf.create(described)).replace(f"run_dir: {RUN_DIR}\n", "run_dir: .\n")
    RunDir(folder).config_path.write_text(text.replace(RUN_DIR, "${run_dir}"), encoding="utf-8")


def _describe_qformer_tokenizer(described: dict[str, Any], folder: Path) -> None:
    own = folder / PARTS / QFORMER_TOKENIZER
    if not own.is_dir():
        return
    loaded = QFormerTokenizer.load(own)
    described["tokenizer"] |= {
        "path": "${run_dir}/" + f"{PARTS}/{QFORMER_TOKENIZER}",
        "vocab_size": loaded.vocab_size,
        "dec_id": loaded.dec_id,
    }


def _language_model(given: dict[str, Any], read: Source, folder: Path, report: ConversionReport) -> dict[str, Any]:
    """The `llm` node: parts/language_model behind the adapter of its kind."""
    own = folder / PARTS / LANGUAGE_MODEL
    decoder_only = not read.config.text_config.is_encoder_decoder
    adapter = "decoder_only.DecoderOnly" if decoder_only else "encoder_decoder.EncoderDecoder"
    target = f"blip2train.model.language_model.{adapter}"
    if (given.get("model") or {}).get("_target_", target) != target:
        raise ConfigError(
            f"the experiment has another kind of language model than the source's {read.config.text_config.model_type}",
            where="model/language_model=",
            fix="give the experiment of this model, or none: the source says what it is",
        )
    dtype = _format(list(read.tensors.language_model.values()))
    if dtype == "float16" and not decoder_only:
        report.notes.append("the language model is saved in float16, in which T5 overflows: it runs in float32 here")
        dtype = "float32"
    tokenizer: dict[str, Any] = {
        "_target_": "blip2train.data.tokenizer.LanguageModelTokenizer.load",
        "path": "${llm.path}",
        **(given.get("tokenizer") or {}),
    }
    if any((own / name).is_file() for name in TOKENIZER_FILES):
        loaded = load_tokenizer(own)
        tokenizer |= {"path": "${llm.path}"} | tokenizer_settings(loaded, read.config.text_config)
        report.notes += end_note(tokenizer["end_token"], loaded)
    question = "Question: {question} Answer:" if decoder_only else "Question: {question} Short answer:"
    described: dict[str, Any] = {
        "caption_prompt": "",
        "question_prompt": question,
        "prefix_split": not decoder_only,
        **given,
        "path": "${run_dir}/" + f"{PARTS}/{LANGUAGE_MODEL}",
        "model": {"_target_": target, "path_or_config": "${llm.path}", "dtype": dtype},
        "tokenizer": tokenizer,
        "architecture": settings.architecture(_original_vocabulary(read)[1]),
    }
    described |= read.side.get("llm", {})
    return described


def _format(tensors: list[Tensor]) -> str:
    """The number format of all tensors; float32, which holds any of them, where they differ."""
    formats = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return settings.name_of(formats.pop()) if len(formats) == 1 else "float32"


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
        state = _original_vocabulary(read)[0]
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
