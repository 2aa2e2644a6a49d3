"""Judge: true captions pass, each kind of lie is caught, ceilings count ambiguity."""

import random

import pytest
import torch

from blip2train.batch import EvalItem
from blip2train.microworld.judge import describe, judge_caption, parse, recall_ceiling, true_of
from blip2train.microworld.language import captions
from blip2train.microworld.scene import COLORS, Scene, SceneObject, WorldSpec, sample_scene

RING = SceneObject("ring", "red", "small", "striped", "top-left")
STAR = SceneObject("star", "blue", "large", "plain", "right")
SCENE = Scene((RING, STAR), "brown", 7)

TRUE = [
    "a ring",
    "a red ring at top-left",
    "a striped small red ring",
    "a red ring and a blue star",
    "a blue star at right and a small striped red ring at top-left on a brown background",
    "a ring left-of a star",
    "a large star below a small ring",
    "a red ring above a star on a brown background",
]
FALSE = [
    "",
    "ring",
    "a red star",
    "a blue ring and a red star",
    "a red ring at right",
    "a large ring",
    "a red ring and a red ring",
    "a red ring and a blue star and a ring",
    "a red ring on a black background",
    "a ring right-of a star",
    "a star above a ring",
    "a red ring at",
    "a red ring and",
    "a red red at top",
    "on a brown background",
    "a red ring on a brown",
    "a red ring yes",
]


@pytest.mark.parametrize("caption", TRUE)
def test_true_captions_pass(caption: str) -> None:
    assert true_of(caption, SCENE)


@pytest.mark.parametrize("caption", FALSE)
def test_false_and_broken_captions_fail(caption: str) -> None:
    assert not true_of(caption, SCENE)


def test_swapping_any_attribute_for_one_the_scene_lacks_makes_every_caption_false() -> None:
    spec = WorldSpec(objects=(1, 2, 3))
    checked = 0
    for index in range(150):
        scene = sample_scene(spec, "all", index)
        present = {item.color for item in scene.objects}
        absent = next(color for color in COLORS if color not in present)
        for caption in captions(scene, random.Random(index)):
            for color in present & set(caption.split()):
                assert not true_of(caption.replace(color, absent, 1), scene)
                checked += 1
    assert checked > 500


def test_verdict_counts_pairs_and_sorts_by_number_of_objects() -> None:
    extra = {"scene": SCENE.to_json()}
    assert judge_caption("a red ring and a blue star", extra) == {
        "true": 1.0, "true_more_objects": 1.0, "object_precision": 1.0, "object_recall": 1.0,
    }  # fmt: skip
    assert judge_caption("a red ring and a red star", extra) == {
        "true": 0.0, "true_more_objects": 0.0, "object_precision": 0.5, "object_recall": 0.5,
    }  # fmt: skip
    alone = {"scene": Scene((RING,), "brown", 0).to_json()}
    assert judge_caption("", alone) == {
        "true": 0.0, "true_one_object": 0.0, "object_precision": 0.0, "object_recall": 0.0,
    }  # fmt: skip


def test_parse_reads_nouns_relations_and_background() -> None:
    claim = parse("a small red ring left-of a star and an orange cross at top on a white background")
    assert claim is not None
    assert claim.nouns == (("small", "red", "ring"), ("star",), ("orange", "cross", "top"))
    assert claim.relations == ((0, "left-of", 1),)
    assert claim.background == "white"


def test_the_ceiling_is_the_mean_chance_of_the_right_image() -> None:
    other = Scene((RING,), "black", 1)
    items = [_item(SCENE, ("a red ring", "a blue star")), _item(other, ("a small ring",))]
    # two captions fit both images, one fits one: (1/2 + 1 + 1/2) / 3
    assert recall_ceiling(items)["image_recall@1_ceiling"] == pytest.approx(100 * 2 / 3)
    assert recall_ceiling([]) == {"image_recall@1_ceiling": 0.0}


def test_the_oracle_text_of_a_record_is_fixed() -> None:
    extra = {"scene": SCENE.to_json()}
    assert describe(extra) == describe(extra)
    assert {"ring", "star", "brown"} <= set(describe(extra).split())


def _item(scene: Scene, texts: tuple[str, ...]) -> EvalItem:
    return EvalItem("key", 0, torch.empty(0, dtype=torch.uint8), texts, (), {"scene": scene.to_json()})
