"""A folder of transformers' Blip2, read -> the config.yaml that describes it as a run.

Implements the settings half of `blip2train convert from=huggingface to=blip2train`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from blip2train.checkpoint import huggingface_config as settings
from blip2train.checkpoint.converted import (
    LANGUAGE_MODEL,
    PARTS,
    QFORMER_TOKENIZER,
    VISION,
    ConversionReport,
    ConvertedModel,
)
from blip2train.checkpoint.huggingface import STAGES, Kind, Tensors, is_eva
from blip2train.checkpoint.huggingface_folder import TOKENIZER_FILES, load_tokenizer
from blip2train.checkpoint.huggingface_text import end_note, tokenizer_settings
from blip2train.cli.check import stage_number
from blip2train.cli.config import compose, resolved_yaml
from blip2train.cli.convert import OWN_KEYS
from blip2train.data.tokenizer import QFormerTokenizer
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir

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


def describe_source(config: DictConfig, kind: Kind, theirs: Any) -> dict[str, Any]:
    """The config to start from: the user's experiment, which must describe this model, or a plain one of its stage.

    Args:
        config: of the command line.
        kind: of the source.
        theirs: transformers' config.

    Raises:
        ConfigError: the experiment describes another model.
    """
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


def write_config(
    described: dict[str, Any], read: Source, model: ConvertedModel, folder: Path, report: ConversionReport
) -> None:
    """config.yaml: the experiment's, with the source's sizes and the folder's own parts.

    Args:
        described: as `describe_source` gives it; changed.
        read: the source.
        model: its tensors in our form.
        folder: of the run.
        report: gets notes.

    Raises:
        ConfigError: the experiment has another kind of language model.
    """
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


def original_vocabulary(read: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The language model without what an earlier export had to add for <image>."""
    text_config = read.config.text_config.to_dict()
    state = dict(read.tensors.language_model)
    added: dict[str, int] = read.side.get("added_rows", {})
    for name, rows in added.items():
        if name in state:
            state[name] = state[name][:rows].clone()
    return state, text_config | read.side.get("text_config", {})


def _given(config: Any, plain: Any) -> dict[str, Any]:
    """What a user has set or added on the command line: where a config differs from the plain one."""
    return {
        key: _given(value, plain[key]) if isinstance(value, dict) and isinstance(plain.get(key), dict) else value
        for key, value in config.items()
        if key not in plain or value != plain[key]
    }


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
        "architecture": settings.architecture(original_vocabulary(read)[1]),
    }
    described |= read.side.get("llm", {})
    return described


def _format(tensors: list[Tensor]) -> str:
    """The number format of all tensors; float32, which holds any of them, where they differ."""
    formats = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return settings.name_of(formats.pop()) if len(formats) == 1 else "float32"
