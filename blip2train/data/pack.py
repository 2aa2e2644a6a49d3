"""A source of rows -> shards with an index and a manifest.

Implements the entry to the data path: everything a user downloads passes through here once. LAVIS needs a dataset
class, a builder and two yaml files for each data set, and reads single files in training. Nothing is left out in
silence: what is not packed is counted by cause and named.

    out/shard-000000.tar ...   whole shards only; shard i holds rows [i * samples_per_shard, (i + 1) * ...) of the
                               source, less those left out, whoever writes it and whenever
    out/index.json             records, bytes and sha256 per shard
    out/manifest.json          source, settings, counts, what was left out and why; written last
    out/skipped.jsonl          everything left out, with its cause, if there is anything
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import math
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, Protocol

from blip2train.data import pack_manifest
from blip2train.data.key_set import KeySet
from blip2train.data.pack_pool import make_shards
from blip2train.data.pack_state import PackFolder, check_disk, finished_manifest
from blip2train.data.pack_worker import PackSettings, ShardTask
from blip2train.data.source.base import Row, Skipped, Source, safe_key
from blip2train.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_LISTED_NAME = "listed.jsonl"
_DISK_MARGIN = 1.25
"""The records so far may be larger than the rest: only a disk that is clearly too small ends the work early."""


class Progress(Protocol):
    def __call__(self, done: int, total: int | None, num_bytes: int) -> None:
        """Called with the rows done, the rows in all if known, and the bytes written by this call."""


def pack(
    source: Source,
    out: str | Path,
    settings: PackSettings | None = None,
    *,
    workers: int = 1,
    max_skipped_share: float = 1.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack a source; repeat the call after an interruption, and it continues.

    Args:
        source: what to pack.
        out: folder of the shards.
        settings: of the shards and images.
        workers: processes; the result does not depend on it. Above one, a script needs the usual
            `if __name__ == "__main__"`.
        max_skipped_share: of the rows; with more left out, there is an error and no manifest.
        progress: called as work goes on.

    Returns:
        The manifest; that of an earlier call if it has finished already.

    Raises:
        ConfigError: a setting out of range.
        DataError: `out` holds another data set or is being packed into, the disk is full, too much was left out, or
            there is nothing to pack.
    """
    if not isinstance(workers, int) or workers < 1:
        raise ConfigError(f"workers={workers!r}", where="pack", fix="give 1 or more, or null for every core")
    if not isinstance(max_skipped_share, int | float) or not 0 <= max_skipped_share <= 1:
        raise ConfigError(f"max_skipped_share={max_skipped_share!r}", where="pack", fix="give a share from 0 to 1")
    settings = settings or PackSettings()
    identity = json.loads(json.dumps({"source": source.identity() or None, "settings": asdict(settings)}))
    manifest = finished_manifest(Path(out), identity)
    if manifest is not None:
        logger.info("%s holds this data set already", out)
        return manifest
    start = time.monotonic()
    with PackFolder(Path(out), identity) as folder:
        try:
            duplicates = _Duplicates(folder.work / _LISTED_NAME, source)
            with duplicates:
                _make_all(source, folder, settings, duplicates, workers, max_skipped_share, progress)
            _check_budget(folder, duplicates, max_skipped_share, folder.totals.rows + duplicates.count)
            skipped = source.skipped.merged(duplicates.skipped)
            made = {"seconds": round(time.monotonic() - start, 1), "workers": workers}
            notes = source.notes() | ({"keys_with_a_hash": duplicates.num_renamed} if duplicates.num_renamed else {})
            return pack_manifest.close(folder, skipped, duplicates.path, notes, made)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError(
                f"the disk is full after {folder.totals.rows} rows",
                where=str(out),
                fix="free space and repeat the command: it continues",
            ) from error


def pack_records(
    records: Iterable[Mapping[str, Any]],
    out: str | Path,
    samples_per_shard: int = 1000,
    *,
    prefix: str = "shard",
    source: Mapping[str, Any] | None = None,
    total: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack records whose images are in memory.

    Args:
        records: each with "key", "image_bytes" and "json" (a mapping, see `data/record_field.py`).
        out: folder of the shards.
        samples_per_shard: records per tar.
        prefix: start of every shard's name.
        source: JSON-able description that identifies the records. With it, an interrupted call is continued and a
            finished one is not repeated; without it, `out` must not hold a data set.
        total: number of records, for `progress`.
        progress: called after every record.

    Returns:
        The manifest.

    Raises:
        DataError: as `pack`.
    """
    return pack(_Records(records, source, total), out, PackSettings(samples_per_shard, prefix), progress=progress)


class _Records:
    """Records in memory as a source."""

    def __init__(
        self, records: Iterable[Mapping[str, Any]], identity: Mapping[str, Any] | None, total: int | None
    ) -> None:
        self.skipped = Skipped()
        self._records, self._identity, self._total = records, identity, total

    def identity(self) -> dict[str, Any]:
        return dict(self._identity or {})

    def count(self) -> int | None:
        return self._total

    def notes(self) -> dict[str, Any]:
        return {}

    def rows(self) -> Iterator[Row]:
        for record in self._records:
            name = str(record["key"])
            yield Row(safe_key(name), name, record["json"], record["image_bytes"])


class _Duplicates:
    """Rows of an image that came before, and rows of other images whose key an earlier one has: those get their own.

    The former, and what the source leaves out, are named in a file that every call makes anew; what is left out of the
    shards is in their reports.
    """

    def __init__(self, path: Path, source: Source) -> None:
        self.path = path
        self.skipped = Skipped(tell=self._tell)
        self.num_renamed = 0
        self._seen = KeySet()
        self._file: IO[str] | None = None
        source.skipped.tell = self._tell

    def __enter__(self) -> None:
        self._file = self.path.open("w", encoding="utf-8")

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def _tell(self, cause: str, name: str, count: int) -> None:
        assert self._file is not None
        self._file.write(pack_manifest.skip_line(cause, name, count))

    @property
    def count(self) -> int:
        return sum(self.skipped.counts.values())

    def without(self, rows: Iterable[Row], batch_size: int) -> Iterator[Row]:
        """The rows of new images, each with a key that no other has."""
        rows = iter(rows)
        while batch := list(itertools.islice(rows, batch_size)):
            names = [os.path.normpath(row.name) for row in batch]  # ./a.jpg is a.jpg
            for row, key in zip(batch, self._seen.claim([row.key for row in batch], names), strict=True):
                if key is None:
                    self.skipped.add("duplicate_key", row.name)
                elif key == row.key:
                    yield row
                else:
                    self.num_renamed += 1
                    yield replace(row, key=key)


def _make_all(
    source: Source,
    folder: PackFolder,
    settings: PackSettings,
    duplicates: _Duplicates,
    workers: int,
    max_skipped_share: float,
    progress: Progress | None,
) -> None:
    total = source.count()
    before = folder.totals.rows

    def on_rows(num_rows: int, num_bytes: int) -> None:
        if progress is not None:
            progress(before + duplicates.count + num_rows, total, num_bytes)

    if total is not None:
        workers = min(workers, max(1, math.ceil(total / settings.samples_per_shard)))
    rows = duplicates.without(source.rows(), settings.samples_per_shard)
    on_rows(0, 0)
    reports = make_shards(_tasks(rows, folder, settings), folder.out, settings, workers, on_rows)
    with closing(reports):
        for report in reports:
            folder.add(report)
            if total:
                _check_budget(folder, duplicates, max_skipped_share, total)
                _check_rest(folder, total)


def _tasks(rows: Iterator[Row], folder: PackFolder, settings: PackSettings) -> Iterator[ShardTask]:
    """One for each shard that is not finished."""
    for number in itertools.count():
        part = tuple(itertools.islice(rows, settings.samples_per_shard))
        if not part:
            return
        checksum = zlib.crc32("\n".join(row.key for row in part).encode("utf-8", "surrogatepass"))
        if not folder.has(number, checksum):
            yield ShardTask(number, part, checksum)


def _check_budget(folder: PackFolder, duplicates: _Duplicates, max_share: float, num_rows: int) -> None:
    """DataError once more rows are left out than `max_share` of `num_rows` allows."""
    causes = folder.totals.skipped + Counter(duplicates.skipped.counts)
    if causes.total() > max_share * num_rows:
        named = ", ".join(f"{count:,} {cause}" for cause, count in causes.most_common())
        raise DataError(
            f"{causes.total():,} of {num_rows:,} rows are left out ({named}); max_skipped_share is {max_share:g}",
            where=f"{folder.identity['source']}",
            fix="if they are to be left out, raise max_skipped_share= and repeat the command, which continues; "
            f"if images were missing, complete them, delete {folder.out} and pack again",
        )


def _check_rest(folder: PackFolder, num_rows: int) -> None:
    """DataError when the rows so far show that the rest will not fit on the disk."""
    done = folder.totals
    rest = done.num_bytes / done.rows * max(0, num_rows - done.rows)
    check_disk(folder.out, int(rest / _DISK_MARGIN))
