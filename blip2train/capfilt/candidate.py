"""Candidate captions of one image -> the few that are kept: CapFilt's rule, a pure function of texts and scores.

Implements section 3.4 of the paper ("Pre-training data and settings"): synthetic captions are ranked together with the
web caption by image-text similarity and the top two are kept. LAVIS ships no CapFilt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from blip2train.capfilt.setting import check_types
from blip2train.data.caption import clean_caption
from blip2train.errors import ConfigError

Origin = Literal["web", "synthetic"]
ORIGINS: tuple[Origin, ...] = get_args(Origin)

LeftOut = Literal["empty", "too_short", "duplicate"]
"""Why a text does not become a candidate."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One caption that stands for an image.

    Args:
        text: in one line.
        origin: who wrote it; a text that both wrote is the web's.
        score: cosine of image and text, -1 to 1; NaN before the ranking.
        kept: whether it goes on to training.
    """

    text: str
    origin: Origin
    score: float = math.nan
    kept: bool = False


@dataclass(frozen=True, slots=True)
class KeepRule:
    """Which candidates are kept.

    Args:
        keep: at most so many per image; the paper keeps 2.
        min_score: leave out candidates below this similarity, even if fewer are kept; None keeps by rank alone, as the
            paper does.
        min_words: leave out shorter texts before the ranking.
    """

    keep: int = 2
    min_score: float | None = None
    min_words: int = 1

    def __post_init__(self) -> None:
        check_types(self, "rule")
        for name, value in (("keep", self.keep), ("min_words", self.min_words)):
            if value < 1:
                raise ConfigError(f"{name}={value}", where=f"rule.{name}", fix="give 1 or more")


def gather_candidates(
    web: Sequence[str], synthetic: Sequence[str], min_words: int = 1
) -> tuple[list[Candidate], Counter[LeftOut]]:
    """Put the texts of one image together, each once, web captions first.

    Two texts are one if training would read them alike, that is, after `clean_caption`. Runs of white space, line
    breaks included, become one space.

    Returns:
        The candidates without scores, and how many texts were left out, by cause.
    """
    found: dict[str, Candidate] = {}
    left_out: Counter[LeftOut] = Counter()
    pairs: list[tuple[Origin, str]] = [("web", text) for text in web] + [("synthetic", text) for text in synthetic]
    for origin, written in pairs:
        text = " ".join(written.split())
        read = clean_caption(text)
        if not read:
            left_out["empty"] += 1
        elif len(read.split()) < min_words:
            left_out["too_short"] += 1
        elif read in found:
            left_out["duplicate"] += 1
        else:
            found[read] = Candidate(text, origin)
    return list(found.values()), left_out


def rank_candidates(candidates: Sequence[Candidate], scores: Sequence[float], rule: KeepRule) -> list[Candidate]:
    """Order by falling score and mark what is kept; equal scores keep their order, so the web caption wins a tie.

    Args:
        candidates: of one image.
        scores: one each, finite.
        rule: how many, and how good.
    """
    assert all(map(math.isfinite, scores))
    scored = [replace(candidate, score=score) for candidate, score in zip(candidates, scores, strict=True)]
    ranked = sorted(scored, key=lambda candidate: -candidate.score)
    least = -math.inf if rule.min_score is None else rule.min_score
    return [
        replace(candidate, kept=place < rule.keep and candidate.score >= least)
        for place, candidate in enumerate(ranked)
    ]
