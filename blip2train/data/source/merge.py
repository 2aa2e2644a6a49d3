"""Lines about images, several of which may speak of the same one -> one entry per image, in bounded memory.

Implements no part of the paper. The file is read twice: once for an 8-byte hash of every name, which tells the names
that come more than once, and once for the entries. Only entries of repeated names are held (then it is read a third
time); a web-sized list with one line per image needs 8 bytes per line.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator

import numpy as np

from blip2train.data.source.base import Fields, Skipped

Entry = tuple[str, Fields]
"""Name of an image and what one line says of it; `captions` is always there."""

ReadEntries = Callable[[Skipped], Iterator[Entry]]
"""Reads a file from its start; counts what it leaves out."""


class Merged:
    """One entry per name, in the order of the names' first lines.

    Args:
        read: opens the file anew; every call must yield the same entries.
    """

    def __init__(self, read: ReadEntries) -> None:
        self._read = read
        self._repeated: set[int] | None = None
        self._num_names = 0

    def count(self) -> int:
        """Number of different names."""
        self._find_repeated()
        return self._num_names

    def entries(self, skipped: Skipped) -> Iterator[Entry]:
        """The entries; lines of one name are merged: captions without repeats, questions one after the other."""
        repeated = self._find_repeated()
        whole: dict[str, Fields] = {}
        if repeated:
            for name, fields in self._read(Skipped()):
                if name in whole:
                    merge(whole[name], fields)
                elif _hash(name) in repeated:
                    whole[name] = fields
        yielded: set[str] = set()
        for name, fields in self._read(skipped):
            if name not in whole:
                yield name, fields
            elif name not in yielded:
                yielded.add(name)
                yield name, whole[name]

    def _find_repeated(self) -> set[int]:
        if self._repeated is None:
            hashes = np.frombuffer(array("Q", (_hash(name) for name, _ in self._read(Skipped()))), dtype=np.uint64)
            values, counts = np.unique(hashes, return_counts=True)
            self._num_names = len(values)
            self._repeated = set(values[counts > 1].tolist())
        return self._repeated


def merge(fields: Fields, more: Fields) -> None:
    """Add to `fields` what another line says of the same image; what is already said stays."""
    known = fields.setdefault("captions", [])
    known += [caption for caption in more.get("captions", ()) if caption not in known]
    if "questions" in more:
        fields["questions"] = [*fields.get("questions", ()), *more["questions"]]
    for name, value in more.items():
        fields.setdefault(name, value)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
