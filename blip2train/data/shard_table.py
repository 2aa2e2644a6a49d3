"""One tar -> a table of its records: where each of their files lies, made by one scan of the headers.

Implements random access to plain WebDataset tars. webdataset reads a tar from its beginning (`tariterators`), which
leaves two things open that a repeatable stream needs: to fetch record number n alone, and to say which records are lost
when a tar is cut off. Records are grouped as webdataset groups them (key = path up to the first dot of the file's name,
extensions in lower case, files of a record lie side by side), so that each reads the other's tars. LAVIS reads with
webdataset.

Names of members are text, never paths: nothing is written, and links are not followed.
"""

from __future__ import annotations

import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from typing import BinaryIO, Literal

from webdataset.tariterators import base_plus_ext

BrokenCause = Literal["unreadable_shard", "truncated_shard", "duplicate_key"]

_SKIPPED = re.compile(r"__[^/]*__($|/)|(.*/)?\.[^/]*$|(.*/)?__MACOSX/")
"""Names webdataset takes for its own data, hidden files, and the second tree that macOS packs."""

_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError)
_BLOCK = tarfile.BLOCKSIZE
_CHECKED_TAIL = 1 << 20


class ShardTable:
    """The records of one tar: about 150 bytes each.

    Args:
        file: the tar, seekable; read from its beginning and left open.

    Attributes:
        damage: what is wrong with the archive as a whole, for a person; None if it ends as it should.
        num_ignored: files that belong to no record: names without a key or an extension, or with one that starts "__".
    """

    def __init__(self, file: BinaryIO) -> None:
        self.damage: str | None = None
        self.num_ignored = 0
        self._keys: list[str] = []
        self._starts = array("q")  # place of the record's first file in the arrays below
        self._offsets = array("q")
        self._sizes = array("q")
        self._extension_numbers = array("I")
        self._extensions: dict[str, int] = {}
        self._broken: dict[int, tuple[BrokenCause, str]] = {}
        self._scan(file)
        self._extension_names = list(self._extensions)
        self._starts.append(len(self._offsets))

    def __len__(self) -> int:
        """Records found, broken ones included."""
        return len(self._keys)

    @property
    def readable(self) -> bool:
        """Whether it is a tar at all."""
        return bool(self._keys) or self.damage is None

    def key(self, index: int) -> str:
        """Valid Unicode, whatever bytes the name was made of."""
        return self._keys[index]

    def broken(self, index: int) -> tuple[BrokenCause, str] | None:
        """Why a record cannot be had, and what was found; None if it can."""
        return self._broken.get(index)

    def files(self, index: int) -> Iterator[tuple[str, int, int]]:
        """(extension, offset, bytes) of each file of a record."""
        for place in range(self._starts[index], self._starts[index + 1]):
            yield self._extension_names[self._extension_numbers[place]], self._offsets[place], self._sizes[place]

    def _scan(self, file: BinaryIO) -> None:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        seen: set[str] = set()
        end, ended = 0, False
        try:
            # tarfile takes damage behind the first header for the end of the archive: `_judge_end` looks again
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # which would grow with every file
                    if member.size < 0 or member.offset < end:
                        raise tarfile.ReadError(f"a file of {member.size} bytes at byte {member.offset}")
                    end = member.offset + _BLOCK
                    self._add(member, seen)
                    if member.isreg() and member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"cut off at byte {size}, inside the file {_readable(member.name)!r}")
                end = tar.offset
            ended = self._judge_end(file, end, size)
        except _TAR_ERRORS as error:
            self.damage = (str(error) or type(error).__name__).splitlines()[0]
        if not ended and self._keys and not self._last_is_whole(size):
            assert self.damage is not None
            self._broken.setdefault(len(self._keys) - 1, ("truncated_shard", self.damage))

    def _add(self, member: tarfile.TarInfo, seen: set[str]) -> None:
        if not member.isreg() or _SKIPPED.match(member.name):
            return
        key, extension = base_plus_ext(_readable(member.name))
        if key is None or extension.startswith("__"):
            self.num_ignored += 1
            return
        extension = extension.lower()
        number = self._extensions.setdefault(extension, len(self._extensions))
        if not self._keys or key != self._keys[-1] or number in self._extension_numbers[self._starts[-1] :]:
            if key in seen:
                self._broken[len(self._keys)] = ("duplicate_key", f"file {_readable(member.name)!r} comes again")
            seen.add(key)
            self._keys.append(key)
            self._starts.append(len(self._offsets))
        if member.issparse():
            self._broken[len(self._keys) - 1] = ("unreadable_shard", "a sparse file, which has no bytes of its own")
        self._extension_numbers.append(number)
        self._offsets.append(member.offset_data)
        self._sizes.append(member.size)

    def _judge_end(self, file: BinaryIO, end: int, size: int) -> bool:
        """Whether the archive has its end mark where tarfile stopped reading."""
        file.seek(end)
        block = file.read(_BLOCK)
        ended = len(block) == _BLOCK and not any(block)
        if len(block) < _BLOCK:
            self.damage = f"no end mark at byte {end}"
        elif not ended:
            self.damage = f"no tar header at byte {end}"
        elif any(file.read(_CHECKED_TAIL)):
            self.damage = f"{size - end} bytes behind the end mark at byte {end}"
        return ended

    def _last_is_whole(self, size: int) -> bool:
        """Without its end, an archive may lack files of its last record; not if the record before has the same ones."""
        start = self._starts[-1]
        if self._offsets[-1] + self._sizes[-1] > size or len(self._starts) < 2:
            return False
        return set(self._extension_numbers[start:]) == set(self._extension_numbers[self._starts[-2] : start])


def finds_key(key: str) -> bool:
    """Whether a table finds the files of a record under this key again."""
    name = f"{key}.x"
    return not _SKIPPED.match(name) and bool(base_plus_ext(name)[0] == key)


def _readable(name: str) -> str:
    """A member's name as text that can be printed, hashed and written; bytes that are no UTF-8 become escapes."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
