"""Caption cleaning against LAVIS's own table; the prefix split against its rule."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from blip2train.data.caption import clean_caption, clean_question, split_prefix_suffix


@pytest.fixture(scope="module")
def table(shared_data: Path) -> dict[str, list[dict[str, str]]]:
    return json.loads((shared_data / "text_cleaning" / "lavis_text_processor_table.json").read_text())


def test_every_caption_is_cleaned_as_lavis_does(table: dict[str, list[dict[str, str]]]) -> None:
    wrong = [row for row in table["caption_rows"] if clean_caption(row["input"]) != row["blip_caption"]]
    assert len(table["caption_rows"]) > 300
    assert wrong == []


def test_every_question_is_cleaned_as_lavis_does(table: dict[str, list[dict[str, str]]]) -> None:
    wrong = [row for row in table["question_rows"] if clean_question(row["input"]) != row["blip_question"]]
    assert len(table["question_rows"]) > 200
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", ""), (" \n ", ""), ("...", ""), ("A  dog.", "a dog"), ("(a) *b* #c", "a b c"), ("tab\tstays", "tab\tstays")],
)
def test_caption_cleaning_on_the_edge(text: str, expected: str) -> None:
    assert clean_caption(text) == expected


def test_max_words_counts_words_between_single_spaces() -> None:
    assert clean_caption("one two three four", max_words=2) == "one two"
    assert clean_question("one two three?", max_words=2) == "one two"


def test_split_is_uniform_from_the_first_word_to_the_middle() -> None:
    words = list("abcdefgh")
    generator = torch.Generator().manual_seed(0)
    lengths = Counter(len(split_prefix_suffix(words, generator)[0]) for _ in range(4000))
    assert set(lengths) == {1, 2, 3, 4}
    assert all(abs(count - 1000) < 120 for count in lengths.values())  # 4 standard deviations


@pytest.mark.parametrize("length", range(7))
def test_split_loses_nothing_and_leaves_no_side_empty(length: int) -> None:
    words = list(range(length))
    prefix, suffix = split_prefix_suffix(words, torch.Generator().manual_seed(length))
    assert prefix + suffix == words
    assert bool(prefix) == (length >= 2)
    assert bool(suffix) == (length >= 1)
