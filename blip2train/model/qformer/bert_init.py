"""BERT's tensors -> the Q-Former's first values, and a report that explains every tensor on both sides.

Implements section 3.1: Q-Former from BERT-base, cross-attention random. As LAVIS, both feed-forward networks start from
BERT's one, token types are left out and [DEC] is random. LAVIS matches names with `strict=False` and prints nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from blip2train.errors import CheckpointError, ConfigError
from blip2train.model.init_report import InitReport, Origin, check_complete
from blip2train.model.qformer.bert_checkpoint import WHERE, BertCheckpoint, read_bert
from blip2train.model.qformer.block import QFormerBlock
from blip2train.model.qformer.qformer import QFormer

_WORDS, _POSITIONS, _WORD_BIAS = "text_embeddings.word.weight", "text_embeddings.position.weight", "lm_head.bias"
_THEIR_WORDS, _THEIR_BIAS = "embeddings.word_embeddings.weight", "cls.predictions.bias"
_DECODER = "cls.predictions.decoder"

# ours -> theirs; the rest of the name (weight, bias) is the same
_TABLE = {
    _WORDS: _THEIR_WORDS,
    _POSITIONS: "embeddings.position_embeddings.weight",
    "embedding_norm": "embeddings.LayerNorm",
    "lm_head.dense": "cls.predictions.transform.dense",
    "lm_head.norm": "cls.predictions.transform.LayerNorm",
    _WORD_BIAS: _THEIR_BIAS,
}
_BLOCK_TABLE = {
    "self_attention.query": "attention.self.query",
    "self_attention.key": "attention.self.key",
    "self_attention.value": "attention.self.value",
    "self_attention.output": "attention.output.dense",
    "self_attention.norm": "attention.output.LayerNorm",
    "expand": "intermediate.dense",
    "contract": "output.dense",
    "norm": "output.LayerNorm",
}
_OUR_BLOCK = re.compile(r"blocks\.(\d+)\.(?:(query_ffn|text_ffn)\.)?(.+)\.(weight|bias)")
_RANDOM = re.compile(r"query_tokens|blocks\.\d+\.cross_attention\..+")
_THEIR_BLOCK = re.compile(r"encoder\.layer\.(\d+)\.")
_LEFT_BEHIND = {
    r"embeddings\.token_type_embeddings\.weight": "token types: the Q-Former has none, as in LAVIS",
    r"embeddings\.(position_ids|token_type_ids)": "constants",
    r"pooler\..+": "the pooler",
    r"cls\.seq_relationship\..+": "the next-sentence head",
    rf"{re.escape(_DECODER)}\.(weight|bias)": "the LM head's tied second names",
    r"(classifier|qa_outputs)\..+": "a head of another task",
}
_TEXT_ONLY = re.compile(r"embeddings\.(word|position)_embeddings\.|cls\.predictions\.")


@dataclass(frozen=True, slots=True)
class _Copy:
    """`tensor` becomes our tensor `name`, or its first rows where it is shorter."""

    name: str
    tensor: Tensor
    origin: Origin


def init_from_bert(
    qformer: QFormer, source: str | Path | BertCheckpoint, words: Sequence[str] | None = None
) -> InitReport:
    """Give a Q-Former a BERT's weights; nothing is written if anything does not fit.

    Word and position embeddings, embedding norm, self-attention, text feed-forward network and LM head come from BERT;
    the query feed-forward network gets a copy. Query tokens, cross-attention and words that BERT does not know keep
    their random values. A Q-Former of fewer layers takes BERT's first ones.

    Args:
        qformer: with or without its text branch.
        source: a local folder, a hub name, or what `read_bert` read there.
        words: vocabulary of the Q-Former's tokenizer by id, to compare with BERT's; None trusts it.

    Returns:
        The origin of every tensor of `qformer`, by its names.

    Raises:
        ConfigError: nothing there, or a tokenizer of another vocabulary.
        CheckpointError: a BERT of other sizes, or a tensor that nobody accounts for; lists all of them.
    """
    bert = source if isinstance(source, BertCheckpoint) else read_bert(source)
    _check_sizes(qformer, bert)
    if qformer.text_embeddings is not None:
        _check_words(qformer.text_embeddings.word.num_embeddings, bert, words)
    state = _untied(bert)
    copies = _plan(qformer, state, bert)
    own = dict(qformer.named_parameters())
    origins: dict[str, Origin] = {name: "random" for name in own if _RANDOM.fullmatch(name) or _no_head(name, state)}
    report = InitReport(
        origins=origins | {copy.name: copy.origin for copy in copies},
        sources={"bert": bert.source},
        dropped=_leftover(qformer, bert),
        notes=_notes(qformer, copies, bert),
    )
    check_complete(qformer, report)
    with torch.no_grad():
        for copy in copies:
            own[copy.name][: len(copy.tensor)].copy_(copy.tensor)
    return report


def _check_sizes(qformer: QFormer, bert: BertCheckpoint) -> None:
    block = qformer.blocks[0]
    assert isinstance(block, QFormerBlock)
    text = qformer.text_embeddings
    pairs = {  # BERT's setting -> ours, and how they must compare
        "hidden_size": (qformer.hidden_size, "equal"),
        "num_attention_heads": (block.self_attention.num_heads, "equal"),
        "intermediate_size": (block.query_ffn.expand.out_features, "equal"),
        "layer_norm_eps": (qformer.embedding_norm.eps, "equal"),
        "num_hidden_layers": (len(qformer.blocks), "at most"),
        "max_position_embeddings": (0 if text is None else text.position.num_embeddings, "at most"),
    }
    problems = [
        f"{key} is {ours}, BERT's is {bert.config[key]}"
        for key, (ours, rule) in pairs.items()
        if (ours != bert.config[key] if rule == "equal" else ours > bert.config[key])
    ]
    if problems:
        raise CheckpointError(
            f"a Q-Former of other sizes than this BERT: {'; '.join(problems)}",
            where=f"model.qformer, {WHERE}={bert.source}",
            fix=f"change model.qformer, take a BERT of its sizes, or set {WHERE}=null for random weights",
        )


def _check_words(vocab_size: int, bert: BertCheckpoint, words: Sequence[str] | None) -> None:
    known = _num_words(bert)
    if known > vocab_size:
        raise CheckpointError(
            f"BERT knows {known} words, the Q-Former {vocab_size}",
            where=f"tokenizer.vocab_size, {WHERE}={bert.source}",
            fix="use BERT's own tokenizer: tokenizer.path=, tokenizer.vocab_size=",
        )
    if words is None or not bert.words:
        return
    pairs = enumerate(zip(words, bert.words[:known], strict=False))
    other = next(((index, *pair) for index, pair in pairs if pair[0] != pair[1]), None)
    if other is not None:
        raise ConfigError(
            f"word {other[0]} is {other[1]!r} to the tokenizer and {other[2]!r} to BERT",
            where=f"tokenizer.path, {WHERE}={bert.source}",
            fix="use BERT's own tokenizer, so that its word embeddings keep their meaning",
        )


def _num_words(bert: BertCheckpoint) -> int:
    """Rows with a meaning: some BERTs pad their embeddings beyond the vocabulary."""
    rows: int = bert.config["vocab_size"]
    return min(rows, len(bert.words) or rows)


def _untied(bert: BertCheckpoint) -> dict[str, Tensor]:
    """BERT's tensors with the LM head's bias under one name; its decoder must be the word embeddings."""
    state = dict(bert.state)
    for first, second in ((_THEIR_WORDS, f"{_DECODER}.weight"), (_THEIR_BIAS, f"{_DECODER}.bias")):
        if first in state and second in state and not torch.equal(state[first], state[second]):
            raise CheckpointError(
                f"{second} is not tied to {first}",
                where=bert.source,
                fix="the Q-Former's LM head is tied: give a BERT with tie_word_embeddings",
            )
        if second in state and first not in state:
            state[first] = state[second]
    return state


def _plan(qformer: QFormer, state: dict[str, Tensor], bert: BertCheckpoint) -> list[_Copy]:
    """Which tensor goes where; all that is missing or of another shape is listed in one error."""
    copies, problems = [], []
    for name, own in qformer.named_parameters():
        theirs = _their_name(name)
        if theirs is None or _no_head(name, state):
            continue
        if theirs not in state:
            problems.append(f"missing: {theirs}")
            continue
        tensor = state[theirs]
        if name in (_WORDS, _WORD_BIAS):
            tensor = tensor[: _num_words(bert)]
        elif name == _POSITIONS:
            tensor = tensor[: len(own)]
        if tensor.shape[1:] != own.shape[1:] or (name not in (_WORDS, _WORD_BIAS) and len(tensor) != len(own)):
            problems.append(f"{theirs} is {tuple(state[theirs].shape)}, {name} {tuple(own.shape)}")
            continue
        copies.append(_Copy(name, tensor, "copied" if ".query_ffn." in name else "bert"))
    if problems:
        raise CheckpointError(
            f"{len(problems)} tensors of BERT do not fit: {', '.join(problems[:8])}",
            where=bert.source,
            fix="give a whole BERT whose tensors have the sizes of its config.json",
        )
    return copies


def _their_name(name: str) -> str | None:
    """BERT's name of one of our tensors; None for those that BERT does not have."""
    block = _OUR_BLOCK.fullmatch(name)
    if block is not None:
        layer, _, inner, leaf = block.groups()
        return f"encoder.layer.{layer}.{_BLOCK_TABLE[inner]}.{leaf}" if inner in _BLOCK_TABLE else None
    if name in _TABLE:
        return _TABLE[name]
    stem, _, leaf = name.rpartition(".")
    return f"{_TABLE[stem]}.{leaf}" if stem in _TABLE else None


def _no_head(name: str, state: dict[str, Tensor]) -> bool:
    """A tensor of the LM head, and BERT came without one: all of it stays random, never a part of it."""
    return name.startswith("lm_head.") and not any(found.startswith("cls.predictions.") for found in state)


def _leftover(qformer: QFormer, bert: BertCheckpoint) -> dict[str, str]:
    """BERT's tensors that no tensor of ours takes, each with the reason."""
    used = {_their_name(name) for name, _ in qformer.named_parameters()}
    reasons = {name: _reason(name, qformer) for name in bert.state if name not in used}
    surprises = [name for name, reason in reasons.items() if reason is None]
    if surprises:
        raise CheckpointError(
            f"{len(surprises)} tensors are none of a BERT's: {', '.join(surprises[:8])}",
            where=bert.source,
            fix="save the plain BERT without what was added to it",
        )
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _reason(name: str, qformer: QFormer) -> str | None:
    layer = _THEIR_BLOCK.match(name)
    if layer is not None:
        return f"layers above the Q-Former's {len(qformer.blocks)}" if int(layer[1]) >= len(qformer.blocks) else None
    if qformer.text_embeddings is None and _TEXT_ONLY.match(name):
        return "the text branch, which stage 2 does not have"
    return next((reason for pattern, reason in _LEFT_BEHIND.items() if re.fullmatch(pattern, name)), None)


def _notes(qformer: QFormer, copies: list[_Copy], bert: BertCheckpoint) -> dict[str, str]:
    own = dict(qformer.named_parameters())
    notes = {
        copy.name: f"{len(copy.tensor)} of {len(own[copy.name])} rows; the others keep their first values"
        for copy in copies
        if len(copy.tensor) < len(own[copy.name])
    }
    if qformer.lm_head is not None and not any(copy.name.startswith("lm_head.") for copy in copies):
        notes["lm_head.dense.weight"] = f"{bert.source} has no LM head"
    return notes
