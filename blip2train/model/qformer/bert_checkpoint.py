"""A BERT-like checkpoint, folder or hub name -> its config and its tensors under one spelling.

What the Q-Former starts from (section 3.1: BERT-base). Read tensor by tensor instead of through transformers' classes,
which give missing tensors random values: every name must be accounted for. Pickles are read without running their code.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BertConfig
from transformers.utils import cached_file

from blip2train.errors import CheckpointError, ConfigError
from blip2train.weight_files import read_weights

WHERE = "init_qformer"
_OLD_LEAVES = {".gamma": ".weight", ".beta": ".bias"}  # of BERT's LayerNorms before 2019


@dataclass(frozen=True, slots=True)
class BertCheckpoint:
    """What a BERT's files hold.

    Args:
        source: the folder or hub name.
        config: its config.json, with every size stated.
        state: tensors; those of the trunk begin with "embeddings.", "encoder." or "pooler.", heads with their own name.
        words: the vocabulary by id; empty where no tokenizer lies beside the weights.
    """

    source: str
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]
    words: tuple[str, ...]


def read_bert(source: str | Path) -> BertCheckpoint:
    """Read a BERT from a local folder or a hub name (network once, then from the cache).

    Takes the layouts of BertModel, BertForPreTraining and BertForMaskedLM, safetensors or pytorch_model.bin, sharded
    or not, and the old LayerNorm names gamma and beta.

    Raises:
        ConfigError: nothing there.
        CheckpointError: not a BERT, an unreadable or missing file, or a pickle that wants to run code.
    """
    config_path = _find(source, "config.json")
    if config_path is None:
        raise ConfigError(
            f"no BERT in {str(source)!r} (no config.json)",
            where=WHERE,
            fix="give a folder with config.json and model.safetensors or pytorch_model.bin, or a name on the hub",
        )
    try:
        config = dict(json.loads(config_path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"not a model's config: {error}", where=str(config_path), fix="copy or download it again"
        ) from error
    _check_kind(config, source)
    state = read_weights(functools.partial(_find, source), where=str(source))
    whole = BertConfig.from_dict(config).to_dict()  # what a config leaves out is BERT-base's
    return BertCheckpoint(str(source), whole, _one_spelling(state, source), _read_words(source))


def _find(source: str | Path, name: str) -> Path | None:
    """One file of a folder or hub repository; None if it has no such file."""
    if Path(source).is_dir():
        return Path(source) / name if (Path(source) / name).is_file() else None
    try:
        found = cached_file(
            str(source),
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no BERT called {str(source)!r}: {str(error).splitlines()[0]}",
            where=WHERE,
            fix="give an existing folder, or the name of a public model on the hub",
        ) from error
    return None if found is None else Path(found)


def _check_kind(config: Mapping[str, Any], source: str | Path) -> None:
    """The Q-Former is BERT's network; one that only looks like it would load and compute something else."""
    kind = config.get("model_type", "bert")  # configs older than the key are BERT's
    if kind != "bert":
        raise CheckpointError(
            f"a {kind}, not a BERT: its text network is another one (positions, norms or embeddings differ)",
            where=str(source),
            fix="give a model whose config.json says model_type bert, such as google-bert/bert-base-uncased",
        )
    for key, wanted in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if config.get(key, wanted) != wanted:
            raise CheckpointError(
                f"{key} is {config[key]!r}, the Q-Former's is {wanted!r}",
                where=f"{source}: config.json",
                fix="give a BERT with exact GELU and absolute positions",
            )


def _one_spelling(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Without the prefix `bert.`, and LayerNorms with weight and bias."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain = name.removeprefix("bert.")
        for old, new in _OLD_LEAVES.items():
            if plain.endswith(old):
                plain = plain.removesuffix(old) + new
        if plain in renamed:
            raise CheckpointError(
                f"{plain} occurs twice (once as {name})", where=str(source), fix="keep one of the two tensors"
            )
        renamed[plain] = tensor
    return renamed


def _read_words(source: str | Path) -> tuple[str, ...]:
    vocabulary = _find(source, "vocab.txt")
    if vocabulary is not None:
        # one word per "\n": some vocabularies hold characters that `splitlines` takes for the end of a line
        return tuple(line.rstrip("\r") for line in vocabulary.read_text(encoding="utf-8").rstrip("\n").split("\n"))
    tokenizer = _find(source, "tokenizer.json")
    if tokenizer is None:
        return ()
    ids = json.loads(tokenizer.read_text(encoding="utf-8"))["model"].get("vocab", {})
    return tuple(sorted(ids, key=ids.__getitem__)) if isinstance(ids, dict) else ()
