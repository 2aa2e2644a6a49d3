"""Scene -> text documents and padded batches of them: what the tiny language models learn to read from.

Implements many prompts per description: each prompt attends to the description and to itself only, exactly the view it
has of a visual prompt in stage 2. LAVIS has no counterpart: its language models come pre-trained.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blip2train.batch import IGNORE_INDEX
from blip2train.microworld.language import (
    CAPTION_TEMPLATES,
    KINDS,
    QUESTION_PROMPT,
    SEPARATOR,
    ask,
    captions,
    tag_groups,
)
from blip2train.microworld.scene import Scene

END = "</s>"
ANSWER_WEIGHT = 3.0
PROMPT_WEIGHT = 0.02
KIND_SHARES = {
    "color": 1.5, "shape": 2.0, "size": 1.5, "texture": 1.5, "where": 2.0, "bg": 0.4, "count": 1.5, "exist": 2.0,
    "rel": 3.0,
}  # fmt: skip
"""How often each kind of question is asked: the slow ones more often."""


ATTRIBUTES = ("color", "shape", "size", "texture", "where", "bg")


@dataclass(frozen=True, slots=True)
class Passage:
    """One prompt with its target, both as words; captions have an empty prompt."""

    prompt: tuple[str, ...]
    target: tuple[str, ...]
    weight: float


@dataclass(frozen=True, slots=True)
class Document:
    """A description and the passages that follow from it; an empty description makes them guesses.

    A description is a sequence of positions, each holding one word or several stacked ones.
    """

    description: tuple[tuple[str, ...], ...]
    passages: tuple[Passage, ...]


def write_document(
    scene: Scene, rng: random.Random, *, stacked_share: float, num_questions: int = 7, num_captions: int = 2
) -> Document:
    """Describe the scene in one of several forms and ask only what the description settles.

    Forms: shuffled tags, some of them stacked (see `_stack`) and a third of them without some attributes (83 %), the
    full caption (12 %), nothing (5 %). While `stacked_share` is 1, descriptions are stacked tags only.

    Args:
        scene: the truth.
        rng: settles form, order and questions.
        stacked_share: share of the tag descriptions that are stacked.
        num_questions: passages that ask.
        num_captions: passages that caption.
    """
    form = rng.random() * (0.83 if stacked_share == 1 else 1.0)
    dropped: frozenset[str] = frozenset()
    description: list[tuple[str, ...]] = []
    if form < 0.83:
        if form < 0.28:
            dropped = frozenset(rng.sample(ATTRIBUTES, rng.randint(1, 4)))
        groups = [group for group in tag_groups(scene, rng, dropped) if group]
        if stacked_share == 1:
            description = [tuple(group) for group in groups]
        else:
            description = _stack(groups, rng) if rng.random() < stacked_share else _spread(groups)
    elif form < 0.95:
        description = [(word,) for word in captions(scene, rng)[-1].split()]
    passages = _captions(scene, rng, dropped, num_captions) + _questions(scene, rng, dropped, num_questions)
    return Document(tuple(description), tuple(passages))


def _spread(groups: list[list[str]]) -> list[tuple[str, ...]]:
    """One word per position, groups apart by the separator: exactly `language.describe`."""
    words = [word for group in groups for word in (*group, SEPARATOR)]
    return [(word,) for word in words[:-1]]


def _stack(groups: list[list[str]], rng: random.Random) -> list[tuple[str, ...]]:
    """Several words of one object at one position (their embeddings are summed), separators only sometimes.

    A visual prompt has fewer positions than a description has words; this teaches that a position may hold more than
    one of them, which spread tags alone never show.
    """
    keep_separators, merge = rng.random() < 0.5, rng.choice((0.5, 0.8, 1.0))
    positions: list[tuple[str, ...]] = []
    for group in groups:
        if keep_separators and positions:
            positions.append((SEPARATOR,))
        current = [group[0]]
        for word in group[1:]:
            if rng.random() < merge:
                current.append(word)
            else:
                positions.append(tuple(current))
                current = [word]
        positions.append(tuple(current))
    return positions


def _captions(scene: Scene, rng: random.Random, dropped: frozenset[str], count: int) -> list[Passage]:
    known = [template for template, needs in CAPTION_TEMPLATES if not needs & dropped]
    texts = [template(scene, rng) for template in rng.sample(known, min(count, len(known)))]
    return [Passage((), (*text.split(), END), 1.0) for text in texts]


def _questions(scene: Scene, rng: random.Random, dropped: frozenset[str], count: int) -> list[Passage]:
    passages: list[Passage] = []
    kinds = rng.choices(KINDS, weights=[KIND_SHARES[kind] for kind in KINDS], k=3 * count)
    for kind in kinds:
        asked = ask(scene, kind, rng)
        if asked is not None and not asked.needs & dropped:
            prompt = QUESTION_PROMPT.format(asked.question).split()
            passages.append(Passage(tuple(prompt), (*asked.answer.split(), END), ANSWER_WEIGHT))
        if len(passages) == count:
            break
    return passages


@dataclass(slots=True)
class CausalBatch:
    """Documents for a decoder-only model, S positions long, V targets in all.

    Args:
        input_ids: (B, S) int64, the first word of every position.
        stacked_positions: (N,) int64 rows of the flattened (B * S) positions that hold a further word.
        stacked_ids: (N,) int64, those words.
        position_ids: (B, S) int64; every passage continues right after its description.
        visible: (B, 1, S, S) bool, True where a token may attend.
        sources: (V,) int64 rows of the flattened (B * S) hidden states that predict.
        targets: (V,) int64.
        weights: (V,) float32.
    """

    input_ids: Tensor
    stacked_positions: Tensor
    stacked_ids: Tensor
    position_ids: Tensor
    visible: Tensor
    sources: Tensor
    targets: Tensor
    weights: Tensor


def causal_batch(documents: Sequence[Document], ids: Mapping[str, int], pad_id: int) -> CausalBatch:
    """Lay documents out for one masked pass; the first word of every passage is predicted by the description's last."""
    lengths = [len(doc.description) + sum(len(p.prompt) + len(p.target) for p in doc.passages) for doc in documents]
    shape = (len(documents), _rounded(max(lengths), 16))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    passage_of = np.full(shape, -1, dtype=np.int64)
    stacked: list[tuple[int, int]] = []
    predicted: list[tuple[int, int, float]] = []
    for row, document in enumerate(documents):
        size = len(document.description)
        base, cursor = row * shape[1], size
        input_ids[row, :size] = [ids[words[0]] for words in document.description]
        stacked += [(base + at, ids[word]) for at, words in enumerate(document.description) for word in words[1:]]
        position_ids[row, :size] = np.arange(size)
        passage_of[row, :size] = 0
        for number, passage in enumerate(document.passages, start=1):
            text = [ids[word] for word in (*passage.prompt, *passage.target)]
            stop = cursor + len(text)
            input_ids[row, cursor:stop] = text
            position_ids[row, cursor:stop] = np.arange(size, size + len(text))
            passage_of[row, cursor:stop] = number
            for offset, word in enumerate(text):
                source = cursor + offset - 1 if offset else size - 1
                if source >= 0:
                    weight = passage.weight if offset >= len(passage.prompt) else PROMPT_WEIGHT
                    predicted.append((base + source, word, weight))
            cursor = stop
    same = passage_of[:, :, None] == passage_of[:, None, :]
    visible = np.tril(same | (passage_of[:, None, :] == 0))[:, None]
    sources, targets, weights = zip(*predicted, strict=True)
    return CausalBatch(
        input_ids=torch.from_numpy(input_ids),
        stacked_positions=torch.tensor([at for at, _ in stacked], dtype=torch.int64),
        stacked_ids=torch.tensor([word for _, word in stacked], dtype=torch.int64),
        position_ids=torch.from_numpy(position_ids),
        visible=torch.from_numpy(visible),
        sources=torch.tensor(sources),
        targets=torch.tensor(targets),
        weights=torch.tensor(weights),
    )


@dataclass(slots=True)
class Seq2SeqBatch:
    """Passages for an encoder-decoder model.

    Args:
        input_ids: (N, S) int64: description and prompt, the first word of every position.
        stacked_positions: (K,) int64 rows of the flattened (N * S) positions that hold a further word.
        stacked_ids: (K,) int64, those words.
        attention_mask: (N, S) bool.
        labels: (N, T) int64, IGNORE_INDEX after the end.
        weights: (N,) float32, one per passage.
    """

    input_ids: Tensor
    stacked_positions: Tensor
    stacked_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    weights: Tensor


def seq2seq_batch(
    documents: Sequence[Document], ids: Mapping[str, int], pad_id: int, rng: random.Random
) -> Seq2SeqBatch:
    """One row per passage; half of the captions move a random prefix into the encoder (prefix language modelling)."""
    rows: list[tuple[list[tuple[str, ...]], list[int], float]] = []
    for document in documents:
        for passage in document.passages:
            prompt, target = passage.prompt, passage.target
            if not prompt and rng.random() < 0.5:
                cut = rng.randint(1, max(1, (len(target) - 1) // 2))
                prompt, target = target[:cut], target[cut:]
            source = [*document.description, *((word,) for word in prompt)] or [(END,)]
            rows.append((source, [ids[word] for word in target], passage.weight))
    rows += [([(END,)], [], 0.0)] * (_rounded(len(rows), 8) - len(rows))
    width = _rounded(max(len(row[0]) for row in rows), 4)
    depth = _rounded(max(len(row[1]) for row in rows), 4)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.bool_)
    labels = np.full((len(rows), depth), IGNORE_INDEX, dtype=np.int64)
    stacked: list[tuple[int, int]] = []
    for index, (positions, target_ids, _) in enumerate(rows):
        input_ids[index, : len(positions)] = [ids[words[0]] for words in positions]
        stacked += [(index * width + at, ids[word]) for at, words in enumerate(positions) for word in words[1:]]
        mask[index, : len(positions)] = True
        labels[index, : len(target_ids)] = target_ids
    return Seq2SeqBatch(
        input_ids=torch.from_numpy(input_ids),
        stacked_positions=torch.tensor([at for at, _ in stacked], dtype=torch.int64),
        stacked_ids=torch.tensor([word for _, word in stacked], dtype=torch.int64),
        attention_mask=torch.from_numpy(mask),
        labels=torch.from_numpy(labels),
        weights=torch.tensor([weight for *_, weight in rows]),
    )


def _rounded(size: int, multiple: int) -> int:
    # a new tensor shape costs the CPU's kernels a compilation each: few shapes train a fifth faster
    return -(-size // multiple) * multiple
