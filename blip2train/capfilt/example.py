"""A few records of every shard for the report: the best, the worst, and some that nobody chose.

Implements the part of CapFilt's report that people look at. Only texts are kept; the pictures lie in the shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from blip2train.capfilt.candidate import Candidate

PER_KIND = 8
KINDS = ("best", "worst", "random")

Row = dict[str, Any]
"""`key`, `score` (of the best candidate), `candidates`; in a report also `shard`, its output shard's name."""


@dataclass
class Examples:
    """Rows by kind: highest and lowest best score, and those whose hashed key comes first, which is no choice."""

    rows: dict[str, list[Row]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def add(self, key: str, candidates: Sequence[Candidate]) -> None:
        """Offer one image with its candidates in falling order."""
        if candidates:
            row = {
                "key": key,
                "score": round(candidates[0].score, 5),
                "candidates": [asdict(found) | {"score": round(found.score, 5)} for found in candidates],
            }
            self._offer([row])

    def merge(self, other: dict[str, list[Row]], shard: str) -> None:
        """Offer what `as_dict` gave for one shard."""
        for kind in KINDS:
            self._offer([row | {"shard": shard} for row in other[kind]], (kind,))

    def as_dict(self) -> dict[str, list[Row]]:
        return self.rows

    def _offer(self, rows: Iterable[Row], kinds: Sequence[str] = KINDS) -> None:
        for kind in kinds:
            self.rows[kind] = sorted([*self.rows[kind], *rows], key=_ORDERS[kind])[:PER_KIND]


def _hashed(row: Row) -> str:
    return hashlib.sha256(row["key"].encode("utf-8", "surrogatepass")).hexdigest()


_ORDERS: dict[str, Any] = {
    "best": lambda row: (-row["score"], row["key"]),
    "worst": lambda row: (row["score"], row["key"]),
    "random": lambda row: (_hashed(row), row["key"]),
}
