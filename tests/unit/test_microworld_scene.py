"""Scenes: determinism, held-out pairs, dials."""

from collections import Counter
from dataclasses import replace

import pytest

from blip2train.errors import ConfigError
from blip2train.microworld.scene import COLORS, SHAPES, Scene, WorldSpec, held_out_pairs, sample_scene

SPEC = WorldSpec()
FIRST_SCENE = (
    [("star", "green", "small", "plain", "left"), ("circle", "pink", "small", "checkered", "bottom-right")],
    "black",
    726368285,
)


def test_a_scene_is_a_function_of_seed_domain_and_number() -> None:
    assert sample_scene(SPEC, "in", 5) == sample_scene(WorldSpec(), "in", 5)
    others = [sample_scene(SPEC, "in", 6), sample_scene(SPEC, "all", 5), sample_scene(replace(SPEC, seed=1), "in", 5)]
    assert all(other != sample_scene(SPEC, "in", 5) for other in others)


def test_the_first_scene_of_the_default_world_never_changes() -> None:
    # shards, published numbers and shipped backbones all assume it
    scene = sample_scene(SPEC, "in", 0)
    words = [(item.shape, item.color, item.size, item.texture, item.position) for item in scene.objects]
    assert (words, scene.background, scene.seed) == FIRST_SCENE


@pytest.mark.parametrize("number", [0, 4, 8, 24])
def test_held_out_pairs_leave_every_shape_and_colour_in_training(number: int) -> None:
    held_out = held_out_pairs(replace(SPEC, held_out=number))
    left = {(shape, color) for shape in SHAPES for color in COLORS} - held_out
    assert len(held_out) == number
    assert {shape for shape, _ in left} == set(SHAPES)
    assert {color for _, color in left} == set(COLORS)


def test_only_the_out_domain_shows_held_out_pairs_and_always_does() -> None:
    held_out = held_out_pairs(SPEC)
    for index in range(500):
        inside = {(item.shape, item.color) for item in sample_scene(SPEC, "in", index).objects}
        outside = {(item.shape, item.color) for item in sample_scene(SPEC, "out", index).objects}
        assert not inside & held_out
        assert outside & held_out


def test_objects_of_a_scene_differ_in_cell_and_pair_and_counts_follow_the_dial() -> None:
    spec = replace(SPEC, objects=(1, 1, 2, 3))
    scenes = [sample_scene(spec, "all", index) for index in range(1000)]
    for scene in scenes:
        assert len({item.position for item in scene.objects}) == len(scene.objects)
        assert len({(item.shape, item.color) for item in scene.objects}) == len(scene.objects)
    counts = Counter(len(scene.objects) for scene in scenes)
    assert 430 < counts[1] < 570 and 190 < counts[2] < 310 and 190 < counts[3] < 310


def test_dials_restrict_what_occurs() -> None:
    spec = replace(SPEC, textures=1, positions=3, backgrounds=2)
    scenes = [sample_scene(spec, "all", index) for index in range(300)]
    assert {item.texture for scene in scenes for item in scene.objects} == {"plain"}
    assert {item.row for scene in scenes for item in scene.objects} == {0}
    assert {scene.background for scene in scenes} == {"black", "gray"}


def test_json_round_trip_keeps_a_scene() -> None:
    scene = sample_scene(SPEC, "in", 3)
    assert Scene.from_json(scene.to_json()) == scene


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"objects": (4,)}, "world.objects"),
        ({"objects": ()}, "world.objects"),
        ({"objects": (3,), "positions": 2}, "world.objects"),
        ({"held_out": 25}, "world.held_out"),
        ({"noise": -1.0}, "world.noise"),
        ({"size": 8}, "world.size"),
    ],
)
def test_impossible_dials_are_refused_by_name(change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        WorldSpec(**change)  # type: ignore[arg-type]


def test_the_out_domain_needs_held_out_pairs() -> None:
    with pytest.raises(ConfigError, match="held_out"):
        sample_scene(replace(SPEC, held_out=0), "out", 0)
