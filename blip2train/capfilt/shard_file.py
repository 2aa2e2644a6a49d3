"""Records -> one tar, whole or not at all, with the same bytes whenever the records are the same.

Implements the writing side of CapFilt. Every file of a record stays beside its image, whatever its extension; only the
JSON is new.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from blip2train.data.shards import RawRecord, ShardEntry


class ShardFile:
    """A tar under construction; `add` appends records."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.num_records = 0

    def add(self, record: RawRecord) -> None:
        """Append the files of a record in their order; names that start with "__" are notes about it, not files."""
        for extension, data in record.items():
            if not extension.startswith("__"):
                member = tarfile.TarInfo(f"{record['__key__']}.{extension}")
                member.size, member.mode = len(data), 0o444
                self._tar.addfile(member, BytesIO(data))
        self.num_records += 1


@contextmanager
def writing(path: Path) -> Iterator[ShardFile]:
    """Open a shard that appears at `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
                yield ShardFile(tar)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def describe(path: Path, num_records: int) -> ShardEntry:
    """The shard's row of `index.json`."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return ShardEntry(path.name, num_records, path.stat().st_size, digest)
