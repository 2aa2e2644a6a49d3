"""Shards -> any record by number, or all in order; what cannot be read comes as a record that says why.

Implements the reading side of the storage: a record costs one read per file of it, and nothing is held back. LAVIS
reads tars from their beginning and goes on with the next shard, without a word, where one is broken.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from blip2train.data.remote import is_remote
from blip2train.data.shard_cache import ShardCache
from blip2train.data.shard_index import UNCOUNTED, Shard
from blip2train.data.shard_table import BrokenCause, ShardTable
from blip2train.errors import DataError

logger = logging.getLogger(__name__)

RawRecord = dict[str, Any]
"""`__key__`, `__url__`, and undecoded bytes by extension: "jpg" (or "png", "webp", ...), "json", "txt". A record that
cannot be had holds `__broken__`, a pair (cause, detail), instead of bytes."""

_ATTEMPTS = 3
_SECONDS_BEFORE_RETRY = 0.2
_TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}
_FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """A shard that was looked into: its table and file, or what was wrong with it."""

    table: ShardTable | None
    file: BinaryIO | None
    failure: str = ""

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class ShardReader:
    """Random access to the records of one dataset, for one process; may be sent to another one, which starts afresh.

    Args:
        shards: of the dataset.
        cache: holds copies of remote shards; by default the one of the environment.
        max_open: shards whose table (about 150 bytes per record) and file are kept open.
    """

    def __init__(self, shards: Sequence[Shard], cache: ShardCache | None = None, max_open: int = 64) -> None:
        assert max_open >= 1
        self.shards = shards
        self.cache = cache or ShardCache()
        self._max_open = max_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._warned: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def record(self, shard: int, index: int) -> RawRecord:
        """Record `index` of shard number `shard`.

        Returns:
            Always a record, see `RawRecord`; causes are "unreadable_shard", "truncated_shard" and "duplicate_key".

        Raises:
            DataError: a remote shard cannot be fetched, or no more files can be opened; that is no fault of the data,
                and goes away.
        """
        opened = self._opened(shard)
        try:
            return self._read(opened, shard, index)
        except OSError:
            self._forget(shard)  # a stale handle, perhaps
        try:
            return self._read(self._opened(shard), shard, index)
        except OSError as error:
            self._forget(shard)
            return self._lost(shard, index, "unreadable_shard", str(error))

    def records(self, shard: int) -> Iterator[RawRecord]:
        """Every record of one shard in file order: those it should hold, or those found in it if they are more."""
        for index in range(max(self.num_found(shard), self.shards[shard].num_records)):
            yield self.record(shard, index)

    def num_found(self, shard: int) -> int:
        """Records of a shard, broken ones included; one that cannot be opened counts as one, which says so."""
        table = self._opened(shard).table
        return 1 if table is None else len(table)

    def damage(self, shard: int) -> str | None:
        """What is wrong with a shard as a whole, for a person."""
        opened = self._opened(shard)
        return opened.failure or None if opened.table is None else opened.table.damage

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch remote shards in the background, in this order; errors show when their records are read."""
        self.cache.prefetch(self.shards[shard] for shard in shards)

    def close(self) -> None:
        for shard in list(self._open):
            self._forget(shard)

    def _read(self, opened: _OpenShard, shard: int, index: int) -> RawRecord:
        table, file = opened.table, opened.file
        if table is None or file is None:
            return self._lost(shard, index, "unreadable_shard", opened.failure)
        if index >= len(table):
            promised = max(self.shards[shard].num_records, index + 1)
            detail = f"{len(table)} of {promised} records found" + (f": {table.damage}" if table.damage else "")
            return self._lost(shard, index, "truncated_shard", detail)
        broken = table.broken(index)
        if broken is not None:
            return self._lost(shard, index, *broken, key=table.key(index))
        record: RawRecord = {"__key__": table.key(index), "__url__": self.shards[shard].url}
        for extension, offset, size in table.files(index):
            data = _pread(file.fileno(), offset, size)
            if len(data) < size:
                detail = f"{extension}: {len(data)} of {size} bytes"
                return self._lost(shard, index, "truncated_shard", detail, key=table.key(index))
            record[extension] = data
        return record

    def _lost(self, shard: int, index: int, cause: BrokenCause, detail: str, key: str | None = None) -> RawRecord:
        url = self.shards[shard].url
        return {
            "__key__": key or f"{file_name(url).split('.')[0]}#{index}",
            "__url__": url,
            "__broken__": (cause, detail),
        }

    def _opened(self, shard: int) -> _OpenShard:
        opened = self._open.get(shard)
        if opened is None:
            opened = self._look_into(shard)
            self._open[shard] = opened
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)[1].close()
        else:
            self._open.move_to_end(shard)
        return opened

    def _look_into(self, shard: int) -> _OpenShard:
        for attempt in range(_ATTEMPTS):
            try:
                file = self.cache.open(self.shards[shard])
            except OSError as error:
                failure = f"{type(error).__name__}: {error.strerror or error}"
                if isinstance(error, _FINAL_ERRORS):
                    break
                if error.errno in _TOO_MANY_FILES:
                    self._keep_fewer_open(shard, error)
                    return self._look_into(shard)
                time.sleep(_SECONDS_BEFORE_RETRY * 2**attempt)
                continue
            table = ShardTable(file)
            self._warn(shard, table)
            if table.readable:
                return _OpenShard(table, file)
            file.close()
            failure = table.damage or ""
            break
        return _OpenShard(None, None, failure)

    def _keep_fewer_open(self, shard: int, error: OSError) -> None:
        """Make do with half the files; a limit of this machine is no fault of the data, which must not be dropped."""
        if not self._open:
            raise DataError(
                f"a shard that cannot be opened ({error.strerror})",
                where=self.shards[shard].url,
                fix="allow a process more open files (`ulimit -n 65536`), or use more data.num_workers",
            ) from error
        self._max_open = max(1, len(self._open) // 2)
        while len(self._open) >= self._max_open:
            self._open.popitem(last=False)[1].close()
        logger.warning("%s: this reader keeps %d shards open from now on", error.strerror, self._max_open)

    def _warn(self, shard: int, table: ShardTable) -> None:
        url, promised = self.shards[shard].url, self.shards[shard].num_records
        if shard in self._warned:
            return
        self._warned.add(shard)
        if table.damage is not None:
            logger.warning("%s is damaged (%s); %d records found", url, table.damage, len(table))
        if UNCOUNTED < promised < len(table):
            logger.warning("%s holds %d records, its index says %d: write it again", url, len(table), promised)

    def _forget(self, shard: int) -> None:
        opened = self._open.pop(shard, None)
        if opened is not None:
            opened.close()


def read_shard(shard: str | Shard, cache: ShardCache | None = None) -> Iterator[RawRecord]:
    """Yield the undecoded records of one tar in file order, broken ones included.

    Args:
        shard: a `Shard` yields as many records as it promises, and those behind them; a path or url those that are
            found. An unreadable one is one record that says so.
        cache: holds copies of remote shards.

    Raises:
        DataError: the tar does not exist, or cannot be fetched.
    """
    wanted = shard if isinstance(shard, Shard) else Shard(shard, UNCOUNTED)
    if not is_remote(wanted.url) and not Path(wanted.url).exists():
        raise DataError("a shard that does not exist", where=wanted.url, fix="check the path, or copy it again")
    reader = ShardReader([wanted], cache)
    try:
        yield from reader.records(0)
    finally:
        reader.close()


def _pread(file: int, offset: int, size: int) -> bytes:
    data = os.pread(file, size, offset)
    while len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
        data += more  # one call gives 2 GiB at most
    return data


def file_name(url: str) -> str:
    """Last part of a path or url."""
    return (url.split("?")[0] if is_remote(url) else url).rsplit("/", 1)[-1]
