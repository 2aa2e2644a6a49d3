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
            key: unique in the data set; no dot, which ends a key in a tar, and no leading "__".
            files: by extension, without a dot.

        Raises:
            DataError: a key that no reader would find again.
        """
        assert self._tar is not None, "neither finished nor abandoned"
        check_key(key)
        for extension in sorted(files):
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size, member.mode = len(files[extension]), 0o444
            self._tar.addfile(member, io.BytesIO(files[extension]))
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
    """DataError for a record key that no reader would find again."""
    if not key or "." in key or key.startswith("__"):
        raise DataError(f"record key {key!r}", where="a shard", fix="use a non-empty key without dots or leading __")


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
