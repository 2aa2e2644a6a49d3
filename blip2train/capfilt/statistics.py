"""Counts and histograms of ranked captions, added up over records, shards and processes.

Implements the report of CapFilt: nothing but whole numbers, so that the sum is the same in any order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blip2train.capfilt.candidate import ORIGINS, Candidate

BINS_PER_UNIT = 200
"""Score histograms have bins of 0.005: number n holds the scores from n / 200 up to, but not, (n + 1) / 200."""

_LONGEST = 60


@dataclass
class Statistics:
    """What happened to the captions of some records.

    Args:
        counts: see `add`; images, texts and captions by name.
        scores: "web" or "synthetic", "kept" or "dropped" -> histogram by bin.
        words: the same groups -> histogram by number of words, the last bin open.
        ranks: place (from 0) of the best web caption among its image's candidates -> images.
    """

    counts: Counter[str] = field(default_factory=Counter)
    scores: dict[str, Counter[int]] = field(default_factory=dict)
    words: dict[str, Counter[int]] = field(default_factory=dict)
    ranks: Counter[int] = field(default_factory=Counter)

    def add(self, ranked: Sequence[Candidate]) -> None:
        """Count one image with its candidates in falling order of score."""
        web = [candidate for candidate in ranked if candidate.origin == "web"]
        self.counts.update(
            images=1,
            candidates=len(ranked),
            captions_kept=sum(candidate.kept for candidate in ranked),
            images_with_web_caption=bool(web),
            images_that_keep_a_web_caption=any(candidate.kept for candidate in web),
            images_whose_best_is_web=bool(ranked) and ranked[0].origin == "web" and ranked[0].kept,
            images_without_caption=not any(candidate.kept for candidate in ranked),
        )
        if web:
            self.ranks[next(place for place, candidate in enumerate(ranked) if candidate.origin == "web")] += 1
        for candidate in ranked:
            self.counts[f"{candidate.origin}_candidates"] += 1
            self.counts[f"{candidate.origin}_kept"] += candidate.kept
            group = f"{candidate.origin} {'kept' if candidate.kept else 'dropped'}"
            self.scores.setdefault(group, Counter())[math.floor(candidate.score * BINS_PER_UNIT)] += 1
            self.words.setdefault(group, Counter())[min(_LONGEST, len(candidate.text.split()))] += 1

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, keys sorted: the same records give the same text."""
        return {
            "bins_per_unit": BINS_PER_UNIT,
            "counts": dict(sorted(self.counts.items())),
            "scores": {name: _rows(self.scores[name]) for name in sorted(self.scores)},
            "words": {name: _rows(self.words[name]) for name in sorted(self.words)},
            "ranks": _rows(self.ranks),
        }


def add_up(parts: Iterable[dict[str, Any]]) -> Statistics:
    """The sum of what `as_dict` gave."""
    total = Statistics()
    for part in parts:
        total.counts.update(part["counts"])
        total.ranks.update(dict(part["ranks"]))
        for own, found in ((total.scores, part["scores"]), (total.words, part["words"])):
            for name, rows in found.items():
                own.setdefault(name, Counter()).update(dict(rows))
    return total


def summarise(statistics: Statistics) -> dict[str, float | None]:
    """The numbers people ask for first; None where there is nothing to divide by."""
    counts = statistics.counts
    with_web = counts["images_with_web_caption"]
    summary = {
        "web_captions_kept_share": _share(counts["web_kept"], counts["web_candidates"]),
        "synthetic_captions_kept_share": _share(counts["synthetic_kept"], counts["synthetic_candidates"]),
        "images_that_keep_a_web_caption_share": _share(counts["images_that_keep_a_web_caption"], with_web),
        "images_whose_best_is_web_share": _share(counts["images_whose_best_is_web"], with_web),
        "captions_kept_per_image": _share(counts["captions_kept"], counts["images"]),
        "duplicate_texts_share": _share(counts["texts_left_out_duplicate"], counts["texts"]),
    }
    for word in (*ORIGINS, "kept", "dropped"):
        summary[f"mean_score_{word}"] = mean_score(statistics.scores, word)
    return summary


def mean_score(groups: Mapping[str, Counter[int]], word: str) -> float | None:
    """Mean score, by the middle of the bins, of all groups whose name holds `word`; None without any."""
    found = [histogram for name, histogram in groups.items() if word in name.split()]
    middle = sum((place + 0.5) * count for histogram in found for place, count in histogram.items()) / BINS_PER_UNIT
    total = sum(histogram.total() for histogram in found)
    return round(middle / total, 4) if total else None


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 5) if whole else None


def _rows(histogram: Counter[int]) -> list[list[int]]:
    """JSON has no integer keys."""
    return [[place, histogram[place]] for place in sorted(histogram)]
