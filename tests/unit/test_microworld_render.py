"""Drawing: exact repetition, and what must be visible is."""

from dataclasses import replace

import numpy as np
import pytest

from blip2train.microworld.render import PALETTE, TONES, render
from blip2train.microworld.scene import COLORS, POSITIONS, SHAPES, Scene, SceneObject, WorldSpec, sample_scene

SPEC = WorldSpec()
STILL = WorldSpec(jitter=0, rotation=0, color_jitter=0, noise=0)


def one(
    shape: str = "circle", color: str = "red", size: str = "large", texture: str = "plain", at: str = "center"
) -> Scene:
    return Scene((SceneObject(shape, color, size, texture, at),), "black", 0)


def test_the_same_scene_gives_the_same_pixels_and_another_seed_does_not() -> None:
    scene = sample_scene(SPEC, "in", 0)
    assert np.array_equal(render(scene, SPEC), render(scene, SPEC))
    assert not np.array_equal(render(scene, SPEC), render(replace(scene, seed=scene.seed + 1), SPEC))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_images_have_the_size_asked_for(size: int) -> None:
    image = render(one(), replace(SPEC, size=size))
    assert image.shape == (size, size, 3) and image.dtype == np.uint8


@pytest.mark.parametrize("position", POSITIONS)
def test_an_object_lies_in_its_cell(position: str) -> None:
    image = render(one(at=position), STILL).astype(int)
    rows, columns = np.nonzero(np.abs(image - TONES["black"]).sum(axis=2) > 60)
    cell = (int(rows.mean() // (64 / 3)), int(columns.mean() // (64 / 3)))
    assert cell == divmod(POSITIONS.index(position), 3)
    assert rows.max() - rows.min() < 22 and columns.max() - columns.min() < 22


@pytest.mark.parametrize("color", COLORS)
def test_without_jitter_the_centre_has_the_palette_colour(color: str) -> None:
    assert tuple(render(one(color=color), STILL)[32, 32]) == PALETTE[color]


def test_large_covers_more_than_small_for_every_shape() -> None:
    for shape in SHAPES:
        small, large = (_area(one(shape, size=size)) for size in ("small", "large"))
        assert large > 1.8 * small


def test_shapes_and_textures_are_told_apart_by_pixels() -> None:
    images = [render(one(shape), STILL).astype(float) for shape in SHAPES]
    images += [render(one(texture=texture), STILL).astype(float) for texture in ("striped", "checkered", "dotted")]
    for first in range(len(images)):
        for second in range(first):
            assert np.abs(images[first] - images[second]).mean() > 0.5


def test_a_ring_has_a_hole_and_a_cross_has_empty_corners() -> None:
    ring, cross = render(one("ring"), STILL), render(one("cross"), STILL)
    assert tuple(ring[32, 32]) == TONES["black"] and tuple(ring[32, 32 + 7]) == PALETTE["red"]
    assert tuple(cross[32, 32]) == PALETTE["red"] and tuple(cross[26, 26]) == TONES["black"]


def test_noise_stays_within_its_dial() -> None:
    clean, noisy = render(one(), STILL).astype(int), render(one(), replace(STILL, noise=10)).astype(int)
    difference = np.abs(clean - noisy)
    assert 4 < difference.mean() < 6 and difference.max() <= 11


def _area(scene: Scene) -> int:
    return int((np.abs(render(scene, STILL).astype(int) - TONES["black"]).sum(axis=2) > 60).sum())
