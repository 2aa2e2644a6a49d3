"""A rename table is read in both directions, loses nothing, and names everything it does not know."""

import pytest

from blip2train.checkpoint.rename import Rule, translate, translate_name
from blip2train.errors import CheckpointError

TABLE = (
    Rule("temperature", "temp"),
    Rule("blocks.{i}.norm.{leaf}", "layer.{i}.LayerNorm.{leaf}"),
    Rule("vision_encoder.backbone.{rest}", "visual_encoder.{rest}"),
)


def test_renames_both_ways_and_keeps_values_and_order() -> None:
    theirs = {"layer.11.LayerNorm.bias": 1, "temp": 2, "visual_encoder.blocks.0.attn.qkv.weight": 3}
    ours = translate(theirs, TABLE, to="ours", where="a")
    assert list(ours.items()) == [
        ("blocks.11.norm.bias", 1),
        ("temperature", 2),
        ("vision_encoder.backbone.blocks.0.attn.qkv.weight", 3),
    ]
    assert translate(ours, TABLE, to="theirs", where="b") == theirs


@pytest.mark.parametrize(
    "name",
    ["temps", "temp.weight", "layer.x.LayerNorm.bias", "layer.1.LayerNorm.a.b", "xlayer.1.LayerNorm.bias", "layer1"],
)
def test_a_pattern_fits_whole_names_only(name: str) -> None:
    assert translate_name(name, TABLE, to="ours") is None


def test_a_dot_in_a_pattern_is_a_dot() -> None:
    assert translate_name("blocksx1xnormxbias", TABLE, to="theirs") is None


def test_every_unmapped_name_is_listed_and_where_it_was_found() -> None:
    state = {f"unknown.{i}": 0 for i in range(40)} | {"temp": 0}
    with pytest.raises(CheckpointError) as caught:
        translate(state, TABLE, to="ours", where="some.pth")
    text = str(caught.value)
    assert "40 of 41 tensors" in text and "some.pth" in text
    assert all(f"unknown.{i}" in text for i in range(40))


def test_two_names_that_become_one_are_an_error_that_names_both() -> None:
    table = (Rule("a", "b"), Rule("a", "c"))
    with pytest.raises(CheckpointError, match=r"c \(would become a, and so would b\)"):
        translate({"b": 0, "c": 1}, table, to="ours", where="x")


def test_a_row_with_unequal_fields_cannot_be_made() -> None:
    with pytest.raises(AssertionError):
        Rule("a.{i}", "b.{leaf}")


def test_a_name_that_fits_two_rows_is_a_fault_of_the_table() -> None:
    with pytest.raises(AssertionError, match="several"):
        translate_name("a.1", (Rule("x.{i}", "a.{i}"), Rule("y.{leaf}", "a.{leaf}")), to="ours")
