"""Folders in place of hub models: LAVIS names `bert-base-uncased` and an LLM; transformers looks for a folder first.

Runs in the environment of `lavis_environment.sh`. Vocabularies are small and made up; the tokenizer classes are the
real ones, so padding, truncation, [CLS] and end tokens are whatever LAVIS does with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BERT = "bert-base-uncased"
_BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def write_bert(folder: Path, config: Mapping[str, Any], vocab: int) -> None:
    """config.json and a word-level vocab.txt of `vocab` lines: the special tokens, then w5, w6, ..."""
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", {"model_type": "bert", "vocab_size": vocab, **config})
    words = _BERT_SPECIAL + [f"w{number}" for number in range(len(_BERT_SPECIAL), vocab)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def write_opt(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json and a GPT-2 tokenizer with OPT's special tokens; letters, space and newline, no merges."""
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", {"model_type": "opt", **config})
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "Ġ", "Ċ", *_LETTERS]  # Ġ and Ċ: GPT-2's spelling of space and newline
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    _write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **special}
    )


def write_t5(folder: Path, config: Mapping[str, Any], words: int) -> None:
    """config.json and a tokenizer.json of whole words (w3, w4, ...), closed by </s> as T5's is."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder.mkdir(parents=True)
    _write_json(folder / "config.json", {"model_type": "t5", **config})
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5TokenizerFast"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content))
