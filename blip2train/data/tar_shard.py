"""Records -> one tar that appears under its name only when it is whole, with its checksum taken on the way.

Implements the writing side of the storage. Times and owners are fixed, so equal records give equal bytes, on any
machine and whoever writes. LAVIS writes no shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from blip2train.data.shard_index import ShardEntry
from blip2train.data.shard_table import finds_key
from blip2train.errors import DataError


class TarShard:
    """Writes one shard: `with TarShard(path, partial) as shard: shard.write(...); entry = shard.finish()`.

    Leaving the block without `finish` leaves no file behind.

    Args:
        path: of the whole shard; an older file there is replaced.
        partial: of the file while it is written, on the same disk.
    """

    def __init__(self, path: Path, partial: Path) -> None:
        self.num_records = 0
        self._path, self._partial = path, partial
        self._file = _HashedFile(partial)
        self._tar: tarfile.TarFile | None = tarfile.TarFile(fileobj=self._file, mode="w")  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Leave no file behind, unless it is finished."""
        if self._tar is not None:
            self._tar = None  # not even its end is written
            with contextlib.suppress(OSError):  # a full disk also refuses what is still buffered
                self._file.close()
            self._partial.unlink(missing_ok=True)

    def write(self, key: str, files: Mapping[str, bytes]) -> None:
        """Append one record.

        Args:
            key: unique in the data set, and one that `check_key` takes.
            files: by extension, without a dot; written in alphabetical order.

        Raises:
            DataError: a key that no reader would find again.
        """
        check_key(key)
        self.append(key, {extension: files[extension] for extension in sorted(files)})

    def append(self, key: str, files: Mapping[str, bytes]) -> None:
        """Append a record that was read from a tar: its files in the order in which they are given, its key as it is.

        Args:
            key: unique in the data set.
            files: by extension, without a dot.
        """
        assert self._tar is not None, "neither finished nor abandoned"
        for extension, data in files.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size, member.mode = len(data), 0o444
            self._tar.addfile(member, io.BytesIO(data))
        self.num_records += 1

    def finish(self) -> ShardEntry:
        """Give the file its name, once its bytes are on the disk."""
        assert self._tar is not None
        self._tar.close()
        self._tar = None
        num_bytes, digest = self._file.finish()
        self._partial.replace(self._path)
        sync(self._path.parent)
        return ShardEntry(self._path.name, self.num_records, num_bytes, digest)


def check_key(key: str) -> None:
    """DataError for a record key that no reader would find again.

    A key is a path: a dot in its last part would end it there, one in a folder's name does not. Readers pass over
    hidden files, and over what webdataset and macOS keep for themselves (`__meta__/...`, `__MACOSX/...`).
    """
    if not finds_key(key):
        raise DataError(
            f"record key {key!r}",
            where="a shard",
            fix="use a key whose last part is not empty and has no dot, outside of __folders__",
        )


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk: a rename is only as durable as its folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _HashedFile:
    """The part of a file that `tarfile` writes to."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=1 << 20)
        self._hash = hashlib.sha256()
        self._num_bytes = 0

    def tell(self) -> int:
        return self._num_bytes

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self._num_bytes += len(data)
        return self._file.write(data)

    def finish(self) -> tuple[int, str]:
        """(bytes, sha256) of what is now on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._num_bytes, self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()
