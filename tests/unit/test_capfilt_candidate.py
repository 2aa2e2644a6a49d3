"""CapFilt's rule: what counts as one text, who wrote it, and which are kept."""

from typing import Any

import pytest

from blip2train.capfilt.candidate import Candidate, KeepRule, gather_candidates, rank_candidates
from blip2train.errors import ConfigError


def test_a_text_that_web_and_model_wrote_is_one_candidate_of_the_web() -> None:
    found, left_out = gather_candidates(["A dog on the sofa."], ["a dog on the sofa", "a brown dog"])
    assert [(row.text, row.origin) for row in found] == [("A dog on the sofa.", "web"), ("a brown dog", "synthetic")]
    assert left_out == {"duplicate": 1}


def test_texts_without_words_and_too_short_ones_are_left_out_and_counted() -> None:
    found, left_out = gather_candidates(["  ", "...!", "IMG_20"], ["a dog", "dog\n runs   fast"], min_words=2)
    assert [row.text for row in found] == ["a dog", "dog runs fast"]
    assert left_out == {"empty": 2, "too_short": 1}


def test_an_image_may_have_no_candidate_at_all() -> None:
    assert gather_candidates([], ["", "!"]) == ([], {"empty": 2})
    assert rank_candidates([], [], KeepRule()) == []


def test_the_best_are_kept_in_order_of_score() -> None:
    candidates = [Candidate("web", "web"), *(Candidate(name, "synthetic") for name in "abc")]
    ranked = rank_candidates(candidates, [0.2, 0.1, 0.3, 0.25], KeepRule(keep=2))
    assert [(row.text, row.score, row.kept) for row in ranked] == [
        ("b", 0.3, True),
        ("c", 0.25, True),
        ("web", 0.2, False),
        ("a", 0.1, False),
    ]


def test_the_web_caption_wins_a_tie() -> None:
    candidates, _ = gather_candidates(["from the web"], ["by a model"])
    assert rank_candidates(candidates, [0.5, 0.5], KeepRule(keep=1))[0].text == "from the web"


def test_a_score_below_the_minimum_is_not_kept_even_if_nothing_is_left() -> None:
    candidates = [Candidate("a", "web"), Candidate("b", "synthetic")]
    assert [row.kept for row in rank_candidates(candidates, [0.1, 0.2], KeepRule(min_score=0.15))] == [True, False]
    assert not any(row.kept for row in rank_candidates(candidates, [0.1, 0.2], KeepRule(min_score=0.3)))


@pytest.mark.parametrize(
    "setting", [{"keep": 0}, {"min_words": 0}, {"keep": "all"}, {"min_score": "high"}, {"min_words": None}]
)
def test_a_rule_that_keeps_nothing_or_is_none_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        KeepRule(**setting)
