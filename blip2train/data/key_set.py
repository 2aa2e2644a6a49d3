"""Which record keys have been seen: exact enough for a hundred million of them, at eight bytes each.

Implements the uniqueness of keys over a whole data set, which LAVIS does not check. A Python set of 100M strings takes
about 14 GB; here they are 0.8 GB, and for a moment twice that while two halves are merged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]


class KeySet:
    """Remembers 64-bit hashes in sorted runs, each at least twice as long as the next.

    Two different keys of a hundred million share a hash with probability 0.0003; the later one then counts as a
    duplicate, by name.
    """

    def __init__(self) -> None:
        self._runs: list[Hashes] = []

    def add(self, keys: Sequence[str]) -> list[bool]:
        """Remember `keys`; which of them are new, also among themselves: (len(keys),)."""
        hashes = np.array([_hash(key) for key in keys], dtype=np.uint64)
        is_new = np.zeros(len(keys), dtype=bool)
        unique, first = np.unique(hashes, return_index=True)
        fresh = np.ones(len(unique), dtype=bool)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, unique), len(run) - 1)
            fresh &= run[places] != unique
        is_new[first[fresh]] = True
        if fresh.any():
            self._runs.append(unique[fresh])
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            # "stable" finds the two sorted runs and merges them in linear time
            merged = np.sort(np.concatenate([self._runs.pop(), self._runs.pop()]), kind="stable")
            self._runs.append(merged)
        return [bool(new) for new in is_new]


def _hash(key: str) -> int:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
