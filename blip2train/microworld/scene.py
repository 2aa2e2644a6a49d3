"""Seed -> scene: what exists in the micro-world, and the one sampler of its scenes.

Implements a controllable stand-in for COCO and NoCaps: exact truth, difficulty dials, held-out shape-colour pairs.
LAVIS has no counterpart: it can only be tried on downloaded data whose truth nobody knows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from blip2train.errors import ConfigError

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "checkered", "dotted")
POSITIONS = (
    "top-left", "top", "top-right",
    "left", "center", "right",
    "bottom-left", "bottom", "bottom-right",
)  # fmt: skip
BACKGROUNDS = ("black", "gray", "white", "brown")
MAX_OBJECTS = 3


@dataclass(frozen=True, slots=True)
class WorldSpec:
    """Size, difficulty and seed of one micro-world; every field is a dial of the laboratory.

    Args:
        size: side of the square image in pixels.
        objects: numbers of objects that a scene draws from, uniformly; repeat a number to weight it.
        textures: how many of the textures occur, from plain on.
        positions: how many of the nine cells occur, in reading order.
        backgrounds: how many of the background tones occur.
        captions: how many caption templates are used per image, from partial to full.
        held_out: how many of the shape-colour pairs no training caption mentions.
        jitter: largest displacement of an object from the centre of its cell, in pixels.
        rotation: largest rotation of an object, in radians.
        color_jitter: largest change of an object's colour channels, of 255; half of it for the background.
        noise: largest change of a single pixel channel, of 255.
        seed: base of every random choice in the world.
    """

    size: int = 64
    objects: tuple[int, ...] = (1, 1, 2)
    textures: int = len(TEXTURES)
    positions: int = len(POSITIONS)
    backgrounds: int = len(BACKGROUNDS)
    captions: int = 5
    held_out: int = 8
    jitter: float = 2.0
    rotation: float = 0.25
    color_jitter: float = 18.0
    noise: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "objects", tuple(int(count) for count in self.objects))
        _check("size", self.size, 32, 512)
        _check("textures", self.textures, 1, len(TEXTURES))
        _check("positions", self.positions, 1, len(POSITIONS))
        _check("backgrounds", self.backgrounds, 1, len(BACKGROUNDS))
        _check("captions", self.captions, 1, 5)
        _check("held_out", self.held_out, 0, len(SHAPES) * len(COLORS) // 2)
        for name in ("jitter", "rotation", "color_jitter", "noise"):
            _check(name, getattr(self, name), 0, 128)
        if not self.objects:
            raise ConfigError("no object counts", where="world.objects", fix="give at least one, such as [1, 1, 2]")
        for count in self.objects:
            _check("objects", count, 1, min(MAX_OBJECTS, self.positions))


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object by its words; `position` names a cell of the 3 x 3 grid."""

    shape: str
    color: str
    size: str
    texture: str
    position: str

    @property
    def column(self) -> int:
        return POSITIONS.index(self.position) % 3

    @property
    def row(self) -> int:
        return POSITIONS.index(self.position) // 3


@dataclass(frozen=True, slots=True)
class Scene:
    """The exact truth of one image; `seed` settles how it is drawn, never what is true of it."""

    objects: tuple[SceneObject, ...]
    background: str
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for a shard record."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Scene:
        """Inverse of `to_json`."""
        objects = tuple(SceneObject(**item) for item in value["objects"])
        return cls(objects=objects, background=value["background"], seed=value["seed"])


def held_out_pairs(spec: WorldSpec) -> frozenset[tuple[str, str]]:
    """Pairs (shape, color) that no training image of the world shows.

    They run along diagonals of the shape x colour table, so that every shape and every colour stays in training; the
    text and image backbones do see them, as CLIP and OPT would, only image-text pairs do not (NoCaps' "out" domain).
    """
    pairs = [
        (SHAPES[(row + diagonal) % len(SHAPES)], COLORS[row])
        for diagonal in range(len(SHAPES))
        for row in range(len(COLORS))
    ]
    return frozenset(pairs[: spec.held_out])


def sample_scene(spec: WorldSpec, domain: str, index: int) -> Scene:
    """Draw scene `index` of a domain; a pure function of its arguments.

    Args:
        spec: the world.
        domain: "in" (no held-out pair), "out" (at least one held-out pair) or "all" (any pair).
        index: number of the scene; also separates train from validation, which use different ranges.

    Raises:
        ConfigError: unknown domain, or "out" in a world that holds nothing out.
    """
    held_out = held_out_pairs(spec)
    every_pair = [(shape, color) for shape in SHAPES for color in COLORS]
    if domain == "in":
        first = rest = [pair for pair in every_pair if pair not in held_out]
    elif domain == "out" and held_out:
        first, rest = sorted(held_out), every_pair
    elif domain == "all":
        first = rest = every_pair
    else:
        raise ConfigError(f"no domain {domain!r}", where="domain", fix="in, all, or out where world.held_out > 0")
    rng = random.Random(f"{spec.seed}/{domain}/{index}")
    return _draw(spec, first, rest, rng)


def _draw(spec: WorldSpec, first: list[tuple[str, str]], rest: list[tuple[str, str]], rng: random.Random) -> Scene:
    count = rng.choice(spec.objects)
    pairs = [rng.choice(first)]
    while len(pairs) < count:
        pair = rng.choice(rest)
        if pair not in pairs:
            pairs.append(pair)
    rng.shuffle(pairs)
    cells = rng.sample(POSITIONS[: spec.positions], count)
    objects = tuple(
        SceneObject(shape, color, rng.choice(SIZES), rng.choice(TEXTURES[: spec.textures]), cell)
        for (shape, color), cell in zip(pairs, cells, strict=True)
    )
    return Scene(objects, rng.choice(BACKGROUNDS[: spec.backgrounds]), rng.getrandbits(32))


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}", where=f"world.{name}", fix=f"use a value from {low} to {high}")
