"""Language: frozen words, true captions, answerable questions, descriptions that determine the scene."""

import random
from collections import Counter

import pytest

from blip2train.microworld.judge import parse, true_of
from blip2train.microworld.language import (
    KINDS,
    QUESTION_PROMPT,
    RELATIONS,
    VOCABULARY,
    Ask,
    ask,
    captions,
    describe,
    questions,
)
from blip2train.microworld.scene import BACKGROUNDS, POSITIONS, SHAPES, Scene, SceneObject, WorldSpec, sample_scene

SPEC = WorldSpec(objects=(1, 2, 3))
SCENES = [sample_scene(SPEC, "all", index) for index in range(400)]


def test_every_sentence_is_made_of_the_vocabulary() -> None:
    known = set(VOCABULARY)
    assert len(known) == len(VOCABULARY) == 64
    for scene in SCENES:
        rng = random.Random(scene.seed)
        asked = questions(scene, rng)
        texts = [describe(scene, rng), *captions(scene, rng), *(item.answer for item in asked)]
        texts += [QUESTION_PROMPT.format(item.question) for item in asked]
        assert set(" ".join(texts).split()) <= known


def test_every_caption_parses_and_is_true_of_its_scene() -> None:
    for scene in SCENES:
        for caption in captions(scene, random.Random(scene.seed)):
            assert parse(caption) is not None, caption
            assert true_of(caption, scene), caption


def test_captions_run_from_partial_to_full() -> None:
    lengths = [[len(caption.split()) for caption in captions(scene, random.Random(0))] for scene in SCENES]
    means = [sum(column) / len(column) for column in zip(*lengths, strict=True)]
    assert len(means) == 5 and means[4] == max(means) and min(means[:2]) < 0.7 * means[4]
    assert captions(SCENES[0], random.Random(0), 2) == captions(SCENES[0], random.Random(0))[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_agree_with_a_reader_of_the_question_alone(kind: str) -> None:
    answers: Counter[str] = Counter()
    for scene in SCENES:
        item = ask(scene, kind, random.Random(scene.seed))
        if item is not None:
            assert item.answer == _read(item.question, scene), (item, scene)
            answers[item.answer] += 1
    assert sum(answers.values()) > 150
    assert answers.most_common(1)[0][1] < 0.7 * sum(answers.values())


def test_yes_and_no_are_balanced() -> None:
    for kind in ("exist", "rel"):
        asked = [ask(scene, kind, random.Random(scene.seed + turn)) for turn in range(3) for scene in SCENES]
        answers = [item.answer for item in asked if item is not None]
        assert 0.42 < answers.count("yes") / len(answers) < 0.58


def test_a_question_never_contains_its_answer() -> None:
    for scene in SCENES:
        for item in questions(scene, random.Random(scene.seed)):
            assert item.answer not in item.question.split(), item


def test_descriptions_hold_every_attribute_in_changing_order() -> None:
    scene = next(scene for scene in SCENES if len(scene.objects) == 2)
    wanted = Counter([scene.background])
    for item in scene.objects:
        wanted.update((item.shape, item.color, item.size, item.texture, item.position))
    texts = {describe(scene, random.Random(seed)) for seed in range(40)}
    assert len(texts) > 30
    for text in texts:
        groups = [group.split() for group in text.split(" and ")]
        assert Counter(word for group in groups for word in group) == wanted
        assert sorted(map(len, groups)) == [1, 5, 5]


def test_needs_name_what_the_answer_depends_on() -> None:
    for scene in SCENES[:100]:
        for item in questions(scene, random.Random(scene.seed)):
            for attribute in {"color", "shape", "size", "texture", "where"} & item.needs:
                values = {getattr(thing, "position" if attribute == "where" else attribute) for thing in scene.objects}
                assert values & {*item.question.split(), item.answer} or item.kind in {"count", "exist", "rel"}, item


def _read(question: str, scene: Scene) -> str:
    """Answer by reading the question's words against the scene; shares no code with the language."""
    words = question.split()
    if question.endswith("the background"):
        return scene.background
    if words[:2] == ["how", "many"]:
        described = [word for word in words[2:] if word != "objects"]
        return ("zero", "one", "two", "three")[sum(set(described) <= _words(item) for item in scene.objects)]
    if words[:2] == ["is", "there"]:
        return "yes" if any({words[3], words[4]} <= _words(item) for item in scene.objects) else "no"
    if words[0] == "is":
        cut = next(index for index, word in enumerate(words) if word in RELATIONS)
        first, second = _only(words[1:cut], scene), _only(words[cut + 1 :], scene)
        delta_row = POSITIONS.index(first.position) // 3 - POSITIONS.index(second.position) // 3
        delta_column = POSITIONS.index(first.position) % 3 - POSITIONS.index(second.position) % 3
        signs = {"left-of": -delta_column, "right-of": delta_column, "above": -delta_row, "below": delta_row}
        return "yes" if signs[words[cut]] > 0 else "no"
    item = _only(words[words.index("is") + 1 :], scene)
    if words[0] == "where":
        return item.position
    return {"color": item.color, "shape": item.shape, "size": item.size, "texture": item.texture}[words[1]]


def _only(phrase: list[str], scene: Scene) -> SceneObject:
    described = {word for word in phrase if word not in {"the", "object", "at"}}
    (found,) = [item for item in scene.objects if described <= _words(item)]
    return found


def _words(item: SceneObject) -> set[str]:
    return {item.shape, item.color, item.size, item.texture, item.position}


def test_words_of_different_attributes_never_coincide() -> None:
    assert not set(SHAPES) & set(BACKGROUNDS)
    assert isinstance(ask(SCENES[0], "bg", random.Random(0)), Ask)
