"""Scene -> uint8 RGB image, in numpy: anti-aliased shapes with textures on a noisy toned background.

Implements the micro-world's camera; every pixel is a pure function of the world's dials and the scene. LAVIS has no
counterpart: its images are files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2train.microworld.scene import Scene, SceneObject, WorldSpec

Floats = NDArray[np.floating[Any]]

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40), "green": (45, 165, 60), "blue": (45, 80, 225), "yellow": (240, 220, 40),
    "purple": (140, 55, 190), "orange": (245, 140, 25), "cyan": (40, 210, 220), "pink": (245, 150, 195),
}  # fmt: skip
TONES: dict[str, tuple[int, int, int]] = {
    "black": (26, 26, 28), "gray": (128, 128, 128), "white": (236, 236, 234), "brown": (105, 72, 45),
}  # fmt: skip
RADII = {"small": 5.6, "large": 9.4}
"""In pixels of a 64-pixel image; larger images scale them."""
SHADE = 0.45
"""Brightness of the dark part of a texture, relative to the object's colour."""


def render(scene: Scene, spec: WorldSpec) -> NDArray[np.uint8]:
    """Draw the scene as (size, size, 3) uint8; objects later in the scene lie on top where they touch."""
    rng = np.random.default_rng(scene.seed)
    canvas = np.empty((spec.size, spec.size, 3), np.float32)
    canvas[:] = _tinted(TONES[scene.background], 0.5 * spec.color_jitter, rng)
    for item in scene.objects:
        _paint(canvas, item, spec, rng)
    if spec.noise:
        canvas += (rng.random(canvas.shape, dtype=np.float32) - 0.5) * np.float32(2 * spec.noise)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _paint(canvas: Floats, item: SceneObject, spec: WorldSpec, rng: np.random.Generator) -> None:
    scale = spec.size / 64
    shift_x, shift_y = rng.uniform(-spec.jitter, spec.jitter, 2) * scale
    angle = rng.uniform(-spec.rotation, spec.rotation)
    phase_x, phase_y = rng.uniform(0, 1, 2)
    radius = RADII[item.size] * scale * rng.uniform(0.94, 1.06)
    color = _tinted(PALETTE[item.color], spec.color_jitter, rng)
    center_x = (item.column + 0.5) * spec.size / 3 + shift_x
    center_y = (item.row + 0.5) * spec.size / 3 + shift_y
    reach = math.ceil(radius * 1.3) + 2
    left, top = max(0, int(center_x) - reach), max(0, int(center_y) - reach)
    right, bottom = min(spec.size, int(center_x) + reach + 1), min(spec.size, int(center_y) + reach + 1)
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32) + 0.5
    x, y = x - np.float32(center_x), y - np.float32(center_y)
    x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    cover = np.clip(0.5 - DISTANCES[item.shape](x, y, radius), 0, 1)[..., None].astype(np.float32)
    period = 5.0 * scale
    light = TEXTURE_LIGHT[item.texture](x / period + phase_x, y / period + phase_y)
    light = (SHADE + (1 - SHADE) * np.clip(light, 0, 1))[..., None]
    patch = canvas[top:bottom, left:right]
    patch += cover * (color * light - patch)


def _tinted(color: tuple[int, int, int], amount: float, rng: np.random.Generator) -> Floats:
    return np.asarray(color, np.float32) + rng.uniform(-amount, amount, 3).astype(np.float32)


# Signed distance to the outline, in pixels, negative inside. -----------------------------------------------------


def _circle(x: Floats, y: Floats, radius: float) -> Floats:
    return np.hypot(x, y) - radius


def _square(x: Floats, y: Floats, radius: float) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius


def _triangle(x: Floats, y: Floats, radius: float) -> Floats:
    y = y - 0.15 * radius
    slope = 0.866 * np.abs(x) - 0.5 * y
    return np.maximum(slope, y) - 0.58 * radius


def _star(x: Floats, y: Floats, radius: float) -> Floats:
    outer, inner, half = 1.18 * radius, 0.5 * radius, math.pi / 5
    turn = np.arctan2(x, -y)
    turn = np.abs(np.mod(turn + half, 2 * half) - half)
    along, across = np.hypot(x, y) * np.cos(turn), np.hypot(x, y) * np.sin(turn)
    end_x, end_y = inner * math.cos(half), inner * math.sin(half)
    normal_x, normal_y = end_y, outer - end_x
    slope: Floats = ((along - outer) * normal_x + across * normal_y) / math.hypot(normal_x, normal_y)
    return slope


def _ring(x: Floats, y: Floats, radius: float) -> Floats:
    return np.abs(np.hypot(x, y) - 0.78 * radius) - 0.24 * radius


def _cross(x: Floats, y: Floats, radius: float) -> Floats:
    wide = np.maximum(np.abs(x) - radius, np.abs(y) - 0.34 * radius)
    tall = np.maximum(np.abs(y) - radius, np.abs(x) - 0.34 * radius)
    return np.minimum(wide, tall)


DISTANCES: dict[str, Callable[[Floats, Floats, float], Floats]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "ring": _ring, "cross": _cross,
}  # fmt: skip


# Brightness in [0, 1] after clipping, over texture coordinates with period one. ----------------------------------


def _plain(u: Floats, v: Floats) -> Floats:
    return np.ones_like(u)


def _striped(u: Floats, v: Floats) -> Floats:
    light: Floats = 0.5 + 3.0 * np.sin(2 * math.pi * v)
    return light


def _checkered(u: Floats, v: Floats) -> Floats:
    light: Floats = 0.5 + 5.0 * np.sin(math.pi * u) * np.sin(math.pi * v)
    return light


def _dotted(u: Floats, v: Floats) -> Floats:
    light: Floats = 3.0 * np.hypot(np.mod(u, 1) - 0.5, np.mod(v, 1) - 0.5) - 0.45
    return light


TEXTURE_LIGHT: dict[str, Callable[[Floats, Floats], Floats]] = {
    "plain": _plain, "striped": _striped, "checkered": _checkered, "dotted": _dotted,
}  # fmt: skip
