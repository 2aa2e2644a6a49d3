"""Scene -> words: captions, questions with answers, and the description that a text oracle reads.

Implements the micro-world's closed language of one-word answers; every sentence is true of its scene by construction.
LAVIS has no counterpart. Prompts follow BLIP-2 (section 4.1): captions start from nothing, questions from a template.

How a language model of this world reads text: no start token; the description (or the visual prompt in its place)
comes first, directly followed by `CAPTION_PROMPT` or `QUESTION_PROMPT`, then the target, then `</s>`. T5 reads all up
to the target in its encoder.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from blip2train.microworld.scene import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
)

CAPTION_PROMPT = ""
QUESTION_PROMPT = "question: {} answer:"
SEPARATOR = "and"
NUMBERS = ("zero", "one", "two", "three")
RELATIONS = ("left-of", "right-of", "above", "below")
KINDS = ("color", "shape", "size", "texture", "where", "bg", "count", "exist", "rel")

VOCABULARY: tuple[str, ...] = (
    *SHAPES, *COLORS, *SIZES, *TEXTURES, *POSITIONS, *BACKGROUNDS, *NUMBERS, *RELATIONS,
    "yes", "no", "a", "an", "and", "at", "on", "background", "question:", "answer:", "what", "where", "is",
    "there", "the", "how", "many", "object", "objects", "color", "shape", "size", "texture",
)  # fmt: skip
"""Every word of the world. Frozen: the shipped backbones' embeddings are rows of this table."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A question with its exact answer; `needs` names the attributes that settle it."""

    kind: str
    question: str
    answer: str
    needs: frozenset[str]


def relation(first: SceneObject, second: SceneObject, rng: random.Random) -> str:
    """A relation word that holds from `first` to `second`; they are in different cells."""
    words = []
    if first.column != second.column:
        words.append("left-of" if first.column < second.column else "right-of")
    if first.row != second.row:
        words.append("above" if first.row < second.row else "below")
    return rng.choice(words)


def holds(word: str, first: SceneObject, second: SceneObject) -> bool:
    """Whether `first` stands in relation `word` to `second`, by their cells."""
    return {
        "left-of": first.column < second.column,
        "right-of": first.column > second.column,
        "above": first.row < second.row,
        "below": first.row > second.row,
    }[word]


# --- captions ---------------------------------------------------------------------------------------------------


def captions(scene: Scene, rng: random.Random, count: int = 5) -> list[str]:
    """One caption per template, the first `count` of: two partial, one relational, one overview, one full."""
    return [template(scene, rng) for template, _ in CAPTION_TEMPLATES[:count]]


def _where(scene: Scene, rng: random.Random) -> str:
    item = rng.choice(scene.objects)
    return f"{_noun(item, 'texture', 'color')} at {item.position}"


def _backdrop(scene: Scene, rng: random.Random) -> str:
    item = rng.choice(scene.objects)
    return f"{_noun(item, 'size', 'color')} {_background(scene)}"


def _related(scene: Scene, rng: random.Random) -> str:
    if len(scene.objects) == 1:
        item = scene.objects[0]
        return f"{_noun(item, 'size', 'texture', 'color')} at {item.position}"
    first, second = rng.sample(scene.objects, 2)
    return f"{_noun(first, 'size', 'color')} {relation(first, second, rng)} {_noun(second, 'size', 'color')}"


def _overview(scene: Scene, rng: random.Random) -> str:
    items = _shuffled(scene.objects, rng)
    return " and ".join(f"{_noun(item, 'color')} at {item.position}" for item in items) + " " + _background(scene)


def _full(scene: Scene, rng: random.Random) -> str:
    items = _shuffled(scene.objects, rng)
    nouns = [f"{_noun(item, 'size', 'texture', 'color')} at {item.position}" for item in items]
    return " and ".join(nouns) + " " + _background(scene)


CAPTION_TEMPLATES: tuple[tuple[Callable[[Scene, random.Random], str], frozenset[str]], ...] = (
    (_where, frozenset({"texture", "color", "shape", "where"})),
    (_backdrop, frozenset({"size", "color", "shape", "bg"})),
    (_related, frozenset({"size", "texture", "color", "shape", "where"})),
    (_overview, frozenset({"color", "shape", "where", "bg"})),
    (_full, frozenset({"size", "texture", "color", "shape", "where", "bg"})),
)


def _noun(item: SceneObject, *attributes: str) -> str:
    words = [_value(item, attribute) for attribute in attributes] + [item.shape]
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def _background(scene: Scene) -> str:
    return f"on a {scene.background} background"


def _value(item: SceneObject, attribute: str) -> str:
    values = {"color": item.color, "shape": item.shape, "size": item.size, "texture": item.texture}
    return values[attribute] if attribute != "where" else item.position


def _shuffled(items: tuple[SceneObject, ...], rng: random.Random) -> list[SceneObject]:
    return rng.sample(items, len(items))


# --- questions --------------------------------------------------------------------------------------------------


def questions(scene: Scene, rng: random.Random, kinds: tuple[str, ...] = KINDS) -> list[Ask]:
    """One question of each kind that can be asked of the scene, in the order of `kinds`."""
    asked = (ask(scene, kind, rng) for kind in kinds)
    return [item for item in asked if item is not None]


def ask(scene: Scene, kind: str, rng: random.Random) -> Ask | None:
    """A question of one kind with one true answer, or None where the scene allows none (a relation of one object)."""
    if kind == "bg":
        return Ask(kind, "what color is the background", scene.background, frozenset({"bg"}))
    if kind == "count":
        return _ask_count(scene, rng)
    if kind == "exist":
        return _ask_exist(scene, rng)
    if kind == "rel":
        return _ask_relation(scene, rng)
    item = rng.choice(scene.objects)
    named = _refer(scene, item, kind, rng)
    if named is None:
        return None
    phrase, needs = named
    if kind == "where":
        return Ask(kind, f"where is {phrase}", item.position, needs | {kind})
    return Ask(kind, f"what {kind} is {phrase}", _value(item, kind), needs | {kind})


def _refer(scene: Scene, item: SceneObject, hidden: str, rng: random.Random) -> tuple[str, frozenset[str]] | None:
    """A phrase that singles `item` out without giving `hidden` away, and the attributes it leans on."""
    by_word = {
        "shape": f"the {item.shape}",
        "color": f"the {item.color} object",
        "where": f"the object at {item.position}",
        "color shape": f"the {item.color} {item.shape}",
        "size shape": f"the {item.size} {item.shape}",
    }
    possible = []
    for attributes in by_word:
        parts = attributes.split()
        same = [other for other in scene.objects if all(_value(other, part) == _value(item, part) for part in parts)]
        if hidden not in parts and len(same) == 1:
            possible.append(attributes)
    if not possible:
        return None
    chosen = rng.choice(possible)
    return by_word[chosen], frozenset(chosen.split())


def _ask_count(scene: Scene, rng: random.Random) -> Ask:
    attribute = rng.choice(("", "color", "size"))
    if not attribute:
        return Ask("count", "how many objects", NUMBERS[len(scene.objects)], frozenset())
    present = _value(rng.choice(scene.objects), attribute)
    word = present if rng.random() < 0.7 else rng.choice(COLORS if attribute == "color" else SIZES)
    number = sum(_value(item, attribute) == word for item in scene.objects)
    return Ask("count", f"how many {word} objects", NUMBERS[number], frozenset({attribute}))


def _ask_exist(scene: Scene, rng: random.Random) -> Ask:
    """Half of the answers are yes; half of the noes recombine a colour and a shape that are both there if possible."""
    item = rng.choice(scene.objects)
    color, shape = item.color, item.shape
    if rng.random() < 0.5:
        other = rng.choice(scene.objects)
        color, shape = (other.color, shape) if rng.random() < 0.5 else (color, other.shape)
        while any((color, shape) == (known.color, known.shape) for known in scene.objects):
            color, shape = (rng.choice(COLORS), shape) if rng.random() < 0.5 else (color, rng.choice(SHAPES))
    there = any((color, shape) == (known.color, known.shape) for known in scene.objects)
    article = "an" if color[0] in "aeiou" else "a"
    return Ask("exist", f"is there {article} {color} {shape}", "yes" if there else "no", frozenset({"color", "shape"}))


def _ask_relation(scene: Scene, rng: random.Random) -> Ask | None:
    if len(scene.objects) < 2:
        return None
    first, second = rng.sample(scene.objects, 2)
    named = [_refer(scene, item, "where", rng) for item in (first, second)]
    if named[0] is None or named[1] is None:
        return None
    true = relation(first, second, rng)
    opposite = {"left-of": "right-of", "right-of": "left-of", "above": "below", "below": "above"}[true]
    word, answer = (true, "yes") if rng.random() < 0.5 else (opposite, "no")
    needs = named[0][1] | named[1][1] | {"where"}
    return Ask("rel", f"is {named[0][0]} {word} {named[1][0]}", answer, needs)


# --- descriptions -----------------------------------------------------------------------------------------------


def describe(scene: Scene, rng: random.Random, dropped: frozenset[str] = frozenset()) -> str:
    """A shuffled list of tags, grouped by object: what the text oracle reads instead of the image."""
    return f" {SEPARATOR} ".join(" ".join(group) for group in tag_groups(scene, rng, dropped))


def tag_groups(scene: Scene, rng: random.Random, dropped: frozenset[str] = frozenset()) -> list[list[str]]:
    """One list of tags per object and one for the background.

    Tag order within a group and group order are random, so that a reader must know words, not places.

    Args:
        scene: the truth.
        rng: settles the order.
        dropped: attributes to leave out ("color", "shape", "size", "texture", "where", "bg").
    """
    kept = [name for name in ("color", "shape", "size", "texture", "where") if name not in dropped]
    groups = [rng.sample([_value(item, name) for name in kept], len(kept)) for item in scene.objects]
    if "bg" not in dropped:
        groups.append([scene.background])
    rng.shuffle(groups)
    return groups
