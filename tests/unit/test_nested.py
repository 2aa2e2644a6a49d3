"""Nested settings are compared leaf by leaf, under dotted names."""

from blip2train.nested import differences, flatten


def test_leaves_have_dotted_names_and_lists_are_leaves() -> None:
    assert flatten({"a": {"b": {"c": 1}, 2: None}, "d": [{"e": 3}]}) == {"a.b.c": 1, "a.2": None, "d": [{"e": 3}]}
    assert flatten({"b": 1}, "a") == {"a.b": 1}


def test_differences_name_every_leaf_and_take_tuples_for_lists() -> None:
    before = {"image": {"size": 8, "mean": [0.5, [1, 2]]}, "gone": 1, "kind": {"a": 1}, "none": None}
    now = {"new": 2, "image": {"size": 16, "mean": (0.5, (1, 2))}, "kind": "a"}
    assert differences(before, now) == {
        "gone": (1, None),
        "image.size": (8, 16),
        "kind": (None, "a"),
        "kind.a": (1, None),
        "new": (None, 2),
    }
    assert list(differences(before, now)) == sorted(differences(before, now))
    assert differences(now, now) == {}
