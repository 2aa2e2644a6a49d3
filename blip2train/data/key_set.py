"""One key per record over a whole data set: exact enough for a hundred million of them, at eight bytes each.

Implements the uniqueness of keys, which LAVIS does not check. A Python set of 100M strings takes about 14 GB; here they
are 0.8 GB, and for a moment twice that while two halves are merged.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

Found = Literal["new", "same", "taken"]
"""Nothing has the key yet; an image of this name has it; one of another name has it."""

_NAME_BITS = 20


class KeySet:
    """Remembers a hash per key, 44 bits of the key and 20 of the image's name, in sorted runs, each at least twice as
    long as the next.

    Of a hundred million keys about 280 meet another's 44 bits: they get a suffix that they would not have needed. Of
    images of different names that do share a key, one in a million meets the other's 20 bits, and counts as the same.
    """

    def __init__(self) -> None:
        self._runs: list[Hashes] = []

    def claim(self, keys: Sequence[str], names: Sequence[str]) -> list[str | None]:
        """Remember `keys`, and find others where they are taken.

        Args:
            keys: as wished, one per image.
            names: of the images: two with one key and one name are the same image.

        Returns:
            One per image: the key as wished by the first image that has it, for those of other names the key with a
            hash of the name behind it, and None for an image that came before. (len(keys),)
        """
        claimed: list[str | None] = []
        for key, name, found in zip(keys, names, self._add(keys, names), strict=True):
            own: str | None = key
            others = _others(key, name)
            while found == "taken":
                own = next(others)
                [found] = self._add([own], [name])
            claimed.append(own if found == "new" else None)
        return claimed

    def _add(self, keys: Sequence[str], names: Sequence[str]) -> list[Found]:
        """Remember what is new, also among themselves."""
        hashes = np.array([_hash(key, name) for key, name in zip(keys, names, strict=True)], dtype=np.uint64)
        _, first, places = np.unique(hashes >> _NAME_BITS, return_index=True, return_inverse=True)
        owners = hashes[first]  # sorted, as the bits of the key come first and none of them comes twice
        fresh = np.ones(len(owners), dtype=bool)
        for run in self._runs:
            nearest = run[np.minimum(np.searchsorted(run, owners >> _NAME_BITS << _NAME_BITS), len(run) - 1)]
            known = nearest >> _NAME_BITS == owners >> _NAME_BITS
            owners = np.where(known, nearest, owners)
            fresh &= ~known
        is_same = owners[places] == hashes
        is_new = np.zeros(len(keys), dtype=bool)
        is_new[first[fresh]] = True
        if fresh.any():
            self._keep(owners[fresh])
        return ["new" if new else "same" if same else "taken" for new, same in zip(is_new, is_same, strict=True)]

    def _keep(self, run: Hashes) -> None:
        self._runs.append(run)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            # "stable" finds the two sorted runs and merges them in linear time
            merged = np.sort(np.concatenate([self._runs.pop(), self._runs.pop()]), kind="stable")
            self._runs.append(merged)


def _others(key: str, name: str) -> Iterator[str]:
    """Keys for an image whose own is taken; the second is needed only where another image is called like the first."""
    for attempt in itertools.count():
        digest = hashlib.blake2b(_encode(name), digest_size=4, salt=attempt.to_bytes(8, "little"))
        yield f"{key}-{digest.hexdigest()}"


def _hash(key: str, name: str) -> int:
    bits = [int.from_bytes(hashlib.blake2b(_encode(text), digest_size=8).digest(), "little") for text in (key, name)]
    return bits[0] >> _NAME_BITS << _NAME_BITS | bits[1] & (1 << _NAME_BITS) - 1


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
