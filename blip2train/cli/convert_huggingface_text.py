"""A run's language model and tokenizers -> those of transformers' Blip2, with its processor.

Implements the half of `blip2train convert from=blip2train to=huggingface` after which transformers' `generate` gives
the ids that ours gives.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from blip2train.checkpoint.converted import LANGUAGE_MODEL, PARTS, ConversionReport, ConvertedModel
from blip2train.checkpoint.huggingface import Kind, Tensors
from blip2train.checkpoint.huggingface_folder import (
    GENERATION,
    PROCESSOR_FILES,
    SOURCE_FILES,
    TOKENIZER_FILES,
    build_processor,
    copy_files,
)
from blip2train.checkpoint.huggingface_text import add_image_rows, frame_prompts, never_say
from blip2train.cli.config import build
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir
from blip2train.weight_files import in_folder, read_weights


@dataclass(slots=True)
class Export:
    """A run on its way out.

    Args:
        run: the folder.
        config: its config.yaml.
        kind: which class of transformers it becomes.
        model: its tensors.
        built: its model on the meta device: shapes and settings.
        side: what the way back needs, for SIDE_FACTS.
    """

    run: RunDir
    config: DictConfig
    kind: Kind
    model: ConvertedModel
    built: Any
    side: dict[str, Any] = field(default_factory=dict)

    @property
    def from_huggingface(self) -> bool:
        """Whether the run is a converted model that came from transformers, with its own settings and files."""
        return self.model.facts.get("format") == "huggingface"


def add_language_model(export: Export, theirs: Any, tensors: Tensors, folder: Path, report: ConversionReport) -> None:
    """Language model, tokenizer and processor, and what `generate` needs to give our ids without being told.

    Args:
        export: the run; what the way back needs is noted in its `side`.
        theirs: transformers' config, to be filled in.
        tensors: get those of the language model.
        folder: of the processor's files.
        report: gets notes.

    Raises:
        ConfigError: a language model that transformers' Blip2 cannot hold.
    """
    tensors.language_model = _language_model_state(export)
    if export.from_huggingface:
        _copy_source_files(export, folder)
        return
    inner = export.built.language_model.model
    text_config = copy.deepcopy(inner.config)
    if inner.get_input_embeddings().embedding_dim != text_config.hidden_size:
        raise ConfigError(
            f"the language model's embeddings are {inner.get_input_embeddings().embedding_dim} wide, its layers "
            f"{text_config.hidden_size}; transformers' Blip2 projects to the latter",
            where="llm.path",
            fix="keep this run in blip2train's form",
        )
    ours = build(export.config.llm.tokenizer)
    tokenizer = ours.transformers_tokenizer
    _frame_like_ours(ours, tokenizer, report)
    tokenizer.padding_side = "right" if text_config.is_encoder_decoder else "left"
    processor = build_processor(tokenizer, export.built.vision_encoder.image, theirs.num_query_tokens)
    image_id = int(tokenizer.convert_tokens_to_ids(processor.image_token.content))
    before = text_config.to_dict()
    _set_special_ids(text_config, ours, report)
    if image_id >= text_config.vocab_size:
        _make_room(export, tensors, text_config, image_id, report)
    changed = {key: before.get(key) for key, value in text_config.to_dict().items() if before.get(key) != value}
    export.side["text_config"] = changed
    export.side["llm"] = _prompts(export.config)
    theirs.text_config = text_config
    theirs.image_token_index = image_id
    theirs.use_decoder_only_language_model = not text_config.is_encoder_decoder
    theirs.is_encoder_decoder = text_config.is_encoder_decoder
    processor.save_pretrained(folder)


def add_qformer_tokenizer(export: Export, folder: Path) -> None:
    """The tokenizer and the processor of a stage-1 model, into `folder`."""
    if export.from_huggingface:
        _copy_source_files(export, folder)
        return
    ours = build(export.config.tokenizer)
    tokenizer = ours.transformers_tokenizer
    probe = ours(["a"], 32)[0][0].tolist()
    frame_prompts(tokenizer, probe, probe[:1], probe[-1:])
    tokenizer.padding_side = "right"
    build_processor(tokenizer, export.built.vision_encoder.image, None).save_pretrained(folder)


def _language_model_state(export: Export) -> dict[str, Tensor]:
    """Every tensor of the language model, by its own names: from parts/, else from where the run took it."""
    own = export.run.path / PARTS / LANGUAGE_MODEL
    if Path(str(export.config.model.language_model.path_or_config)) == own and own.is_dir():
        return read_weights(in_folder(own), where=str(own))
    return dict(build(export.config.model.language_model).model.state_dict())


def _frame_like_ours(ours: Any, tokenizer: Any, report: ConversionReport) -> None:
    probe = ours.encode_prompt(["a"], 32)[0][0].tolist()
    body = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = probe.index(body[0]) if body else len(probe)
    if frame_prompts(tokenizer, probe, probe[:start], probe[start + len(body) :]):
        report.notes.append("the tokenizer now puts the start and end tokens around a prompt as blip2train does")


def _set_special_ids(text_config: Any, ours: Any, report: ConversionReport) -> None:
    """transformers' Blip2 generates with the ids of text_config: make them those that end and open our texts."""
    text_config.eos_token_id = ours.end_id
    if text_config.pad_token_id is None:
        text_config.pad_token_id = ours.pad_id
    empty = ours.encode_prompt([""], 32)[0][0].tolist()
    if empty:
        text_config.bos_token_id = empty[0]  # what `generate` puts after the image where it is given no text
    else:
        report.notes.append("generate() needs input_ids (the processor's, with text): this model opens no empty prompt")


def _make_room(export: Export, tensors: Tensors, text_config: Any, image_id: int, report: ConversionReport) -> None:
    """One more row for <image> in the embeddings, which generation can never choose."""
    inner = export.built.language_model.model
    names = [
        name
        for module in (inner.get_input_embeddings(), inner.get_output_embeddings())
        for name in _names_of(inner, module)
        if name in tensors.language_model
    ]
    names += [name for name in tensors.language_model if name in inner.all_tied_weights_keys and name not in names]
    export.side["added_rows"] = {name: tensors.language_model[name].shape[0] for name in names}
    tensors.language_model = add_image_rows(tensors.language_model, names, image_id + 1)
    text_config.vocab_size = image_id + 1
    for key, value in never_say(image_id).items():
        setattr(text_config, key, value)
    report.notes.append(
        f"the language model had no free row for <image>: row {image_id} was added, with a bias that keeps it from "
        "being generated; logits have one column more than blip2train's"
    )


def _names_of(model: nn.Module, part: nn.Module) -> list[str]:
    prefix = next(name for name, module in model.named_modules() if module is part)
    return [f"{prefix}.{name}" for name, _ in part.named_parameters()]


def _prompts(config: DictConfig) -> dict[str, Any]:
    """The llm settings that transformers' files do not say."""
    kept = ("caption_prompt", "question_prompt", "prefix_split")
    return {key: OmegaConf.select(config, f"llm.{key}") for key in kept if key in config.llm}


def _copy_source_files(export: Export, folder: Path) -> None:
    source = export.run.path / PARTS / SOURCE_FILES
    copy_files(source, folder, (*TOKENIZER_FILES, *PROCESSOR_FILES, GENERATION))
