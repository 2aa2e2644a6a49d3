"""The local copy of one shard: opened, uncompressed, compared with its index.

Implements what `data/shard_cache.py` does with a single file.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from blip2train.data.remote import is_remote
from blip2train.data.shard_index import Shard
from blip2train.errors import DataError

logger = logging.getLogger(__name__)

GZIP_ENDINGS = (".tar.gz", ".tgz")


def open_copy(path: Path, shard: Shard) -> BinaryIO | None:
    """An existing copy, marked as used now; None if there is none of the right size."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return None
    if shard.num_bytes is not None and not is_packed(shard.url) and os.fstat(file.fileno()).st_size != shard.num_bytes:
        file.close()
        return None
    with suppress(PermissionError):  # another user's copy
        os.utime(file.fileno())
    return file


def is_right(partial: Path, shard: Shard, last: bool) -> bool:
    """Whether a download has the checksum of its index, if that has one.

    Raises:
        DataError: it has not, and this was the last attempt.
    """
    if not shard.sha256:
        return True
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest == shard.sha256:
        return True
    if last:
        raise DataError(
            f"a shard whose sha256 is {digest[:12]}..., where its index says {shard.sha256[:12]}...",
            where=shard.url,
            fix="it was changed or damaged in its store: copy it there again, or write the index again",
        )
    logger.warning("%s: the sha256 is not that of the index, downloading it again", shard.url)
    return False


def uncompress(source: Path, target: Path) -> None:
    """Write what a gzip file holds; of a damaged one, what comes before the damage."""
    with gzip.open(source) as packed, target.open("wb") as plain:
        try:
            while chunk := packed.read1(1 << 20):
                plain.write(chunk)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            logger.warning("%s: a damaged gzip stream (%s)", source, error)


def list_copies(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """(path, bytes, time of last use) of everything that a download left."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".tar", ".partial", ".plain")):
                try:
                    facts = entry.stat()
                except FileNotFoundError:
                    continue
                yield Path(entry.path), facts.st_size, facts.st_mtime_ns


def is_packed(url: str) -> bool:
    """Whether a shard is compressed, which its copy is not."""
    return (url.split("?")[0] if is_remote(url) else url).endswith(GZIP_ENDINGS)
