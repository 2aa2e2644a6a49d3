"""Shards anyone wrote -> `index.json`: records, bytes and checksum of each, so that nobody counts them again.

Implements `blip2train data index`. A call that was interrupted goes on where it was; a shard is looked at again when
its size or time changed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from blip2train.data.remote import beside, is_remote
from blip2train.data.shard_cache import ShardCache
from blip2train.data.shard_copy import is_packed
from blip2train.data.shard_index import INDEX_NAME, ShardEntry, parse_damaged, parse_index, write_rows
from blip2train.data.shard_reader import file_name
from blip2train.data.shard_table import ShardTable
from blip2train.data.worker_process import run_tasks, worker_context, worker_pool
from blip2train.errors import ConfigError, DataError
from blip2train.run_dir import check_writable

Progress = Callable[[int, int | None, int | None], None]
"""Called with (shards done, shards in all, bytes done)."""

_SECONDS_BETWEEN_SAVES = 10.0


@dataclass(frozen=True, slots=True)
class ScannedShard:
    """What one shard turned out to be.

    Args:
        url: as given.
        entry: its row, without a place; None if it is no tar, or not there.
        damage: what is wrong with it, for a person; None if nothing is.
    """

    url: str
    entry: ShardEntry | None
    damage: str | None = None


def index_shards(
    urls: Sequence[str],
    *,
    out: Path | None = None,
    cache: ShardCache | None = None,
    workers: int = 1,
    checksums: bool = True,
    progress: Progress | None = None,
) -> list[ScannedShard]:
    """Count the records of shards and write their index; shards an index knows already are not read again.

    Args:
        urls: of single shards.
        out: index file to write; None: `index.json` beside the shards, in each of their folders. It names shards by
            file name, or by whole url where two of them have the same.
        cache: reaches remote shards.
        workers: processes.
        checksums: take the sha256, which reads every byte; without it, the headers are enough.
        progress: told after every shard.

    Returns:
        One per url, in the same order. A damaged shard counts with the records it has; an unreadable one is in no
        index.

    Raises:
        ConfigError: remote shards and no `out`, or an index that could not be written.
        DataError: a store out of reach, or a file in the index's place that is none. What was done is kept.
    """
    if out is None and any(map(is_remote, urls)):
        raise ConfigError(
            "remote shards, beside which nothing can be written",
            where="out=null",
            fix="give out=FILE.json, and that file as index= of the dataset, or upload it beside them as index.json",
        )
    books = _Books(urls, out, checksums)
    tasks = [url for url in urls if url not in books.done]
    num_bytes = 0
    scan = partial(scan_shard, cache=cache or ShardCache(), checksums=checksums)
    try:
        for scanned in _in_pool(scan, tasks, workers) if workers > 1 else map(scan, tasks):
            books.add(scanned)
            num_bytes += scanned.entry.num_bytes if scanned.entry else 0
            if progress is not None:
                progress(len(books.done), len(urls), num_bytes)
    finally:
        books.save()
    return [books.done[url] for url in urls]


def scan_shard(url: str, cache: ShardCache, checksums: bool = True) -> ScannedShard:
    """Look at one shard.

    Raises:
        DataError: its store is out of reach.
    """
    try:
        with cache.open(url) as file:
            table = ShardTable(file)
            if not table.readable:
                return ScannedShard(url, None, f"no tar: {table.damage}")
            size = file.seek(0, os.SEEK_END)
            digest = _sha256(file) if checksums else ""
        if is_packed(url):  # what was read is the uncompressed copy
            size, digest = (0, "") if is_remote(url) else _facts(Path(url), checksums)
    except OSError as error:
        return ScannedShard(url, None, f"{type(error).__name__}: {error.strerror or error}")
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return ScannedShard(url, None, error.found)
        raise
    broken = Counter(pair[0] for pair in map(table.broken, range(len(table))) if pair is not None)
    found = [f"{count} records: {cause}" for cause, count in broken.items()]
    damage = "; ".join(([table.damage] if table.damage else []) + found) or None
    return ScannedShard(url, ShardEntry(file_name(url), len(table), size, digest), damage)


def _facts(path: Path, checksums: bool) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, _sha256(file) if checksums else ""


def _sha256(file: BinaryIO) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # opened files have readinto


class _Books:
    """The indexes being written, and what they knew before."""

    def __init__(self, urls: Sequence[str], out: Path | None, checksums: bool) -> None:
        names = Counter(file_name(url) for url in urls)
        self._names = {url: url if out and names[file_name(url)] > 1 else file_name(url) for url in urls}
        self._files = {url: out or Path(beside(url, INDEX_NAME)) for url in urls}
        self._rows: dict[Path, dict[str, ShardEntry]] = {}
        self.done: dict[str, ScannedShard] = {}
        self._saved = time.monotonic()
        self._damaged: dict[Path, dict[str, str]] = {}
        for file in set(self._files.values()):
            if out or file.parent.is_dir():  # of shards that are not there no index is written
                check_writable(file, f"out={out}" if out else "out=null (beside the shards)")
            content = file.read_bytes() if file.is_file() else b'{"shards": []}'
            rows, self._damaged[file] = parse_index(content, str(file)), parse_damaged(content)
            self._rows[file] = {name: row for name, row in rows.items() if out or (file.parent / name).is_file()}
        for url in urls:
            file, name = self._files[url], self._names[url]
            row = self._rows[file].pop(name, None)
            was_damaged = self._damaged[file].pop(name, None)
            if row and not was_damaged and (row.sha256 or not checksums) and _is_unchanged(url, row, file):
                self._keep(ScannedShard(url, row))

    def add(self, scanned: ScannedShard) -> None:
        self._keep(scanned)
        if time.monotonic() - self._saved >= _SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        for file, rows in self._rows.items():
            if rows or file.is_file():
                write_rows(file, list(rows.values()), self._damaged[file])
        self._saved = time.monotonic()

    def _keep(self, scanned: ScannedShard) -> None:
        self.done[scanned.url] = scanned
        file, name = self._files[scanned.url], self._names[scanned.url]
        if scanned.entry is not None:
            self._rows[file][name] = replace(scanned.entry, name=name)
            if scanned.damage is not None:
                self._damaged[file][name] = scanned.damage


def _is_unchanged(url: str, row: ShardEntry, index: Path) -> bool:
    """As large as it was, and not written after the index; a remote shard is taken to be what it was."""
    if is_remote(url):
        return True
    facts = Path(url).stat()
    return facts.st_size == row.num_bytes and facts.st_mtime <= index.stat().st_mtime


def _in_pool(scan: Callable[[str], ScannedShard], urls: Sequence[str], workers: int) -> Iterator[ScannedShard]:
    fix = "repeat the command: it continues; with fewer workers= if it happens again"
    with worker_pool(worker_context(__name__), workers, fix) as pool:
        for _, scanned in run_tasks(pool, scan, urls, workers):
            yield scanned
