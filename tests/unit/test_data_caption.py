"""Caption cleaning against LAVIS's own table; the prefix split against its rule."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from blip2train.data.caption import TextOptions, clean_caption, clean_question, split_prefix_suffix
from blip2train.errors import ConfigError


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


def lavis_caption(caption: str, max_words: int) -> str:
    """LAVIS's `BlipCaptionProcessor.pre_caption`, word for word (salesforce-lavis 1.0.2, BSD-3)."""
    caption = re.sub(r"([.!\"()*#:;~])", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption)
    caption = caption.rstrip("\n")
    caption = caption.strip(" ")
    caption_words = caption.split(" ")
    if len(caption_words) > max_words:
        caption = " ".join(caption_words[:max_words])
    return caption


def lavis_question(question: str, max_words: int) -> str:
    """LAVIS's `BlipQuestionProcessor.pre_question`, word for word."""
    question = re.sub(r"([.!\"()*#:;~])", "", question.lower())
    question = question.rstrip(" ")
    question_words = question.split(" ")
    if len(question_words) > max_words:
        question = " ".join(question_words[:max_words])
    return question


def test_cleaning_equals_lavis_on_any_text() -> None:
    rng = random.Random(0)
    pieces = [
        *".!\"()*#:;~?,-'/\\ \t\n\r\x0b\x1c\x85\xa0\u2028\u3000",
        "  ",
        "A",
        "Dog",
        "İ",
        "ß",
        "É",
        "ǅ",
        "中文",
        "😀",
        "e\u0301",
    ]
    for _ in range(4000):
        text = "".join(rng.choices(pieces, k=rng.randrange(40)))
        max_words = rng.choice((1, 2, 5, 50))
        assert clean_caption(text, max_words) == lavis_caption(text, max_words), repr(text)
        assert clean_question(text, max_words) == lavis_question(text, max_words), repr(text)


def test_options_leave_text_raw_or_normalise_it_first() -> None:
    text = "A Cafe\u0301.  Yes"
    assert TextOptions().apply(text) == clean_caption(text)
    assert TextOptions(clean=False).apply(text) == text
    assert TextOptions(clean=False, max_words=2).apply(text) == "A Cafe\u0301."
    assert TextOptions(unicode_form="NFC").apply(text) == "a caf\xe9 yes"
    assert TextOptions(max_words=None).apply("a " * 99) == ("a " * 99).strip()
    assert TextOptions(unicode_form="NFKC").apply("\u2026") == "\u2026"  # three dots, of which nothing would be left


@pytest.mark.parametrize("options", [{"clean": "question"}, {"max_words": 0}, {"unicode_form": "utf8"}])
def test_unknown_options_are_refused_by_name(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        TextOptions(**options)


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
