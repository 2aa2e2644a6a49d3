"""A folder of transformers' `save_pretrained` <-> tensors, settings and the files beside them.

Not in the paper. Reads every tensor in the number format it was saved in and runs no code of a pickle; writes a folder
that `from_pretrained` and `AutoProcessor` read with nothing else. transformers loads with missing and surplus tensors.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
    GenerationConfig,
)
from transformers import logging as transformers_logging

from blip2train.batch import ImageSpec
from blip2train.checkpoint.converted import FREE_SPACE
from blip2train.checkpoint.huggingface import Kind
from blip2train.checkpoint.io import disk_error
from blip2train.errors import CheckpointError, ConfigError
from blip2train.run_dir import read_json

CONFIG = "config.json"
GENERATION = "generation_config.json"
SIDE_TENSORS = "blip2train_extra.safetensors"
SIDE_FACTS = "blip2train_extra.json"
"""Beside an exported model: what transformers cannot hold, for the way back."""

SOURCE_FILES = "huggingface"
"""Folder in a converted run's parts/ with the source's processor, tokenizer and generation files, for the way back."""

MAX_SHARD = "5GB"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "chat_template.jinja",
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_GENERATION_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "sequence_bias",
    "renormalize_logits",
)
_PIL_FILTERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}
_CLASSES = {"generation": Blip2ForConditionalGeneration, "retrieval": Blip2ForImageTextRetrieval}


def read_json_file(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: no such file, or no JSON object in it.
    """
    try:
        loaded = read_json(path)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"no readable {path.name} ({error})", where=str(path.parent), fix="give a folder of save_pretrained"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path.name} is no object", where=str(path), fix="give a folder of save_pretrained")
    return loaded


def read_image_processor(folder: Path) -> dict[str, Any]:
    """Settings of the image processor, in either of the two files transformers has kept them in; empty if in none."""
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            raw = read_json_file(folder / name)
            settings = raw.get("image_processor", raw if "image_mean" in raw else {})
            if settings:
                return dict(settings)
    return {}


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> list[str]:
    """Copy those of the named files that exist; returns them."""
    copied = [name for name in names if (source / name).is_file()]
    if copied:
        target.mkdir(parents=True, exist_ok=True)
    for name in copied:
        shutil.copyfile(source / name, target / name)
    return copied


def load_tokenizer(path: str | Path) -> Any:
    """The transformers tokenizer of a folder or hub name.

    Raises:
        ConfigError: nothing loadable there.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"no tokenizer in {str(path)!r} ({str(error).splitlines()[0]})",
            where="tokenizer",
            fix="give a folder with tokenizer files, or the name of a model on the hub",
        ) from error


def build_processor(tokenizer: Any, image: ImageSpec, num_query_tokens: int | None) -> Blip2Processor:
    """A processor that resizes and normalises as our transform and encoder do; adds <image> to the tokenizer."""
    images = BlipImageProcessor(
        size={"height": image.size, "width": image.size},
        image_mean=list(image.mean),
        image_std=list(image.std),
        resample=_PIL_FILTERS[image.interpolation],
    )
    return Blip2Processor(images, tokenizer, num_query_tokens=num_query_tokens)


def write_model(folder: Path, config: Blip2Config, state: Mapping[str, Tensor], kind: Kind, dtype: str) -> None:
    """Write config.json and the weights, each tensor in its own number format, as `save_pretrained` does.

    Args:
        folder: receives the files.
        config: of the model.
        state: every tensor, tied ones included or not.
        kind: which class.
        dtype: what `from_pretrained` loads when it is not told.

    Raises:
        CheckpointError: tensors are missing, surplus or of another shape (lists them), or the disk is full.
    """
    with torch.device("meta"):
        model = _CLASSES[kind](config)
    _check_state(model, state, folder)
    model.load_state_dict(dict(state), strict=False, assign=True)
    try:
        with _quiet():
            model.tie_weights(missing_keys={name for name in model.state_dict() if name not in state})
            model.save_pretrained(folder, max_shard_size=MAX_SHARD)
    except (OSError, SafetensorError) as error:
        raise disk_error(error, folder, FREE_SPACE) from error
    raw = read_json(folder / CONFIG)
    (folder / CONFIG).write_text(json.dumps(raw | {"dtype": dtype}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_state(model: Any, state: Mapping[str, Tensor], where: Path) -> None:
    wanted = model.state_dict()
    tied = set(model.all_tied_weights_keys)
    problems = [f"missing: {name}" for name in wanted if name not in state and name not in tied]
    problems += [f"unexpected: {name}" for name in state if name not in wanted]
    problems += [
        f"{name}: {tuple(tensor.shape)} for {tuple(wanted[name].shape)}"
        for name, tensor in state.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    if problems:
        raise CheckpointError(
            f"{len(problems)} tensors do not fit {type(model).__name__}:\n    " + "\n    ".join(problems[:12]),
            where=str(where),
            fix="the run's model is another network than its config.yaml says",
        )


def write_generation_config(folder: Path) -> None:
    """Write generation_config.json: the ids and biases of text_config, with which `generate` runs anyway."""
    text_config = Blip2Config.from_pretrained(folder).text_config
    found = {key: getattr(text_config, key, None) for key in _GENERATION_KEYS}
    GenerationConfig(**{key: value for key, value in found.items() if value is not None}).save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no warning that a T5 has a head of its own, which transformers' config cannot say."""
    bar, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
