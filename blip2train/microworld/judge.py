"""Caption + truth -> verdict: what a benchmark of the micro-world knows exactly and no real data set does.

Implements full parsing of the world's captions against the scene, the recall ceiling that ambiguous captions set, and
the text oracle's description. LAVIS has no counterpart: captions are scored by n-grams alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from blip2train.batch import EvalItem
from blip2train.microworld import language
from blip2train.microworld.scene import BACKGROUNDS, COLORS, POSITIONS, SHAPES, SIZES, TEXTURES, Scene, SceneObject

_ADJECTIVES = frozenset((*COLORS, *SIZES, *TEXTURES))


@dataclass(frozen=True, slots=True)
class Claim:
    """What a caption states.

    Args:
        nouns: one tuple of words per mentioned object; adjectives, shape, and the cell after "at".
        relations: (index of the first noun, relation word, index of the second).
        background: the tone, or "" if none is mentioned.
    """

    nouns: tuple[tuple[str, ...], ...]
    relations: tuple[tuple[int, str, int], ...]
    background: str


def parse(caption: str) -> Claim | None:
    """Read a caption of the world's grammar, adjectives in any order; None if it is not one."""
    words = caption.split()
    nouns: list[tuple[str, ...]] = []
    relations: list[tuple[int, str, int]] = []
    cursor = 0
    while True:
        found = _parse_noun(words, cursor)
        if found is None:
            return None
        noun, cursor = found
        nouns.append(noun)
        rest = words[cursor:]
        if not rest:
            return Claim(tuple(nouns), tuple(relations), "")
        if len(rest) == 4 and rest[:2] == ["on", "a"] and rest[2] in BACKGROUNDS and rest[3] == "background":
            return Claim(tuple(nouns), tuple(relations), rest[2])
        if rest[0] in language.RELATIONS:
            relations.append((len(nouns) - 1, rest[0], len(nouns)))
        elif rest[0] != language.SEPARATOR:
            return None
        cursor += 1


def true_of(caption: str | Claim, scene: Scene) -> bool:
    """Whether every statement of the caption holds of the scene, each noun meaning another object.

    A caption outside the grammar states nothing and is not true.
    """
    claim = parse(caption) if isinstance(caption, str) else caption
    if claim is None or (claim.background and claim.background != scene.background):
        return False
    if len(claim.nouns) > len(scene.objects):
        return False
    return any(_fits(claim, order) for order in permutations(scene.objects, len(claim.nouns)))


def judge_caption(caption: str, extra: Mapping[str, Any]) -> dict[str, float]:
    """Judge a caption by the record it belongs to.

    Args:
        caption: any text.
        extra: the record's remaining JSON, with "scene".

    Returns:
        "true" (all of it holds), the same as "true_one_object" or "true_more_objects" by the scene's number of
        objects, "object_precision" and "object_recall" of mentioned (colour, shape) pairs; each from 0 to 1.
    """
    scene = Scene.from_json(extra["scene"])
    true = float(true_of(caption, scene))
    named = _pairs(caption)
    there = [(item.color, item.shape) for item in scene.objects]
    hits = sum(min(named.count(pair), there.count(pair)) for pair in set(named))
    return {
        "true": true,
        "true_one_object" if len(there) == 1 else "true_more_objects": true,
        "object_precision": hits / len(named) if named else 0.0,
        "object_recall": hits / len(there),
    }


def recall_ceiling(items: Sequence[EvalItem]) -> dict[str, float]:
    """Best image recall@1 that can be expected among these items, in percent, since captions are ambiguous.

    A caption that is true of n of the images finds its own with chance 1/n, whatever the model.
    """
    scenes = [Scene.from_json(item.extra["scene"]) for item in items]
    chances = []
    for item in items:
        for caption in item.captions:
            claim = parse(caption)
            fitting = sum(true_of(claim, scene) for scene in scenes) if claim is not None else 1
            chances.append(1.0 / max(1, fitting))
    return {"image_recall@1_ceiling": 100.0 * sum(chances) / max(1, len(chances))}


def describe(extra: Mapping[str, Any]) -> str:
    """The scene of a record in shuffled tags: what the text oracle reads in place of the image."""
    scene = Scene.from_json(extra["scene"])
    return language.describe(scene, random.Random(scene.seed))


def _parse_noun(words: Sequence[str], cursor: int) -> tuple[tuple[str, ...], int] | None:
    if cursor >= len(words) or words[cursor] not in ("a", "an"):
        return None
    stop = cursor + 1
    while stop < len(words) and words[stop] in _ADJECTIVES:
        stop += 1
    if stop >= len(words) or words[stop] not in SHAPES:
        return None
    noun, stop = tuple(words[cursor + 1 : stop + 1]), stop + 1
    if words[stop : stop + 1] == ["at"]:
        if stop + 1 >= len(words) or words[stop + 1] not in POSITIONS:
            return None
        return (*noun, words[stop + 1]), stop + 2
    return noun, stop


def _fits(claim: Claim, order: Sequence[SceneObject]) -> bool:
    for noun, item in zip(claim.nouns, order, strict=True):
        if not set(noun) <= {item.shape, item.color, item.size, item.texture, item.position}:
            return False
    return all(language.holds(word, order[first], order[second]) for first, word, second in claim.relations)


def _pairs(caption: str) -> list[tuple[str, str]]:
    """(colour, shape) of each shape word, the colour being the last one before it since the previous shape."""
    pairs, color = [], ""
    for word in caption.split():
        if word in COLORS:
            color = word
        elif word in SHAPES:
            pairs.append((color, word))
            color = ""
    return pairs
