"""The folder that is packed into: what earlier calls have finished in it, and what is left to say when all is done.

Implements no part of the paper, and nothing in LAVIS: a call that was killed continues after its whole shards, a
finished one is not repeated, nothing is ever written over another data set.

    out/.pack/identity.json     what is being packed, and how
    out/.pack/finished.jsonl    one `ShardReport` per whole shard, in the order they were finished
    out/.pack/*.partial         files being written
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from blip2train.data.file_lock import take_lock
from blip2train.data.pack_worker import WORK_FOLDER, ShardReport
from blip2train.data.shard_index import MANIFEST_NAME
from blip2train.data.tar_shard import sync
from blip2train.errors import DataError
from blip2train.run_dir import free_bytes, read_json, write_json

logger = logging.getLogger(__name__)

SKIPPED_NAME = "skipped.jsonl"

_IDENTITY_NAME = "identity.json"
_FINISHED_NAME = "finished.jsonl"
_SPARE_BYTES = 64 << 20


@dataclass
class Totals:
    """Sums over the finished shards."""

    rows: int = 0
    records: int = 0
    num_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, report: ShardReport) -> None:
        self.rows += report.num_rows
        self.skipped.update(cause for cause, _ in report.skipped)
        if report.entry is not None:
            self.records += report.entry.num_records
            self.num_bytes += report.entry.num_bytes

    @property
    def num_skipped(self) -> int:
        return self.skipped.total()


class PackFolder:
    """One call's hold on a folder of shards; no other process packs into it meanwhile.

    Args:
        out: the folder; made if missing.
        identity: "source" and "settings" of the data set, JSON-able. A source of None cannot be continued.

    Raises:
        DataError: another data set lies there, another process is packing there, or the disk is full.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.out, self.work = out, out / WORK_FOLDER
        self.identity = identity
        self.totals = Totals()
        self._places: dict[int, int] = {}
        self._checksums: dict[int, int] = {}
        self._log: IO[bytes] | None = None
        self._lock: int | None = None

    def __enter__(self) -> Self:
        check_disk(self.out, 0)
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = "choose a folder that you may write to"
            raise DataError(f"no folder can be made here ({error.strerror})", where=str(self.out), fix=fix) from error
        self._lock = os.open(self.work, os.O_RDONLY)
        try:
            free = take_lock(self._lock)
        except OSError as error:
            free = True
            logger.warning("%s is on a disk without locks (%s): see that only one call packs there", self.out, error)
        if not free:
            os.close(self._lock)
            raise DataError(
                "a folder that another process is packing into", where=str(self.out), fix="wait for it, or stop it"
            )
        for partial in self.work.glob("*.partial"):
            partial.unlink()
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.close()
        if self._lock is not None:
            os.close(self._lock)

    def has(self, number: int, checksum: int) -> bool:
        """Whether shard `number` is finished.

        Raises:
            DataError: it is, but of other rows.
        """
        if number not in self._places:
            return False
        if self._checksums[number] != checksum:
            raise DataError(
                f"the rows of shard {number} are not those that an interrupted call packed",
                where=str(self.out),
                fix="the source has changed since: delete the folder and pack again",
            )
        return True

    def add(self, report: ShardReport) -> None:
        """Remember a finished shard, for good."""
        assert self._log is not None
        place = self._log.tell()
        self._log.write(json.dumps(report.to_json(), ensure_ascii=True).encode() + b"\n")
        self._log.flush()
        os.fsync(self._log.fileno())
        self._take(report, place)

    def reports(self) -> Iterator[ShardReport]:
        """Of every finished shard, in the order of their numbers; one is in memory at a time."""
        with (self.work / _FINISHED_NAME).open("rb") as log:
            for number in sorted(self._places):
                log.seek(self._places[number])
                yield ShardReport.from_json(json.loads(log.readline()))

    def _read(self) -> None:
        path = self.work / _IDENTITY_NAME
        log = self.work / _FINISHED_NAME
        if path.is_file() and log.is_file() and log.stat().st_size:
            if self.identity["source"] is None or read_json(path) != self.identity:
                raise DataError(
                    "an interrupted call with another source or other settings left shards here",
                    where=str(self.out),
                    fix="repeat that call to finish it, choose another folder, or delete this one",
                )
        else:
            write_json(path, self.identity)
            log.unlink(missing_ok=True)
        end = 0
        if log.is_file():
            for place, report in _whole_lines(log):
                end = place
                entry = report.entry
                if entry is None or _has_size(self.out / entry.name, entry.num_bytes):
                    self._take(report, place)
            logger.info("continuing in %s after %s rows", self.out, f"{self.totals.rows:,}")
            with log.open("rb") as lines:
                lines.seek(end)
                lines.readline()
                end = lines.tell()
        self._log = log.open("ab")
        self._log.truncate(end)
        self._log.seek(end)
        sync(self.work)

    def _take(self, report: ShardReport, place: int) -> None:
        self._places[report.number], self._checksums[report.number] = place, report.checksum
        self.totals.add(report)


def finished_manifest(out: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of the same finished data set; None where nothing lies, or an unfinished one.

    Raises:
        DataError: another data set lies there, an unknown one, or one that has lost shards.
    """
    path = out / MANIFEST_NAME
    found = "a folder that holds another data set"
    if path.is_file():
        manifest = read_json(path)
        if identity["source"] is not None and all(manifest.get(name) == value for name, value in identity.items()):
            rows = manifest["shards"]
            lost = [row["name"] for row in rows if not _has_size(out / row["name"], row["num_bytes"])]
            if not lost:
                shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
                return manifest
            found = f"{len(lost)} of the {len(rows)} shards packed here are gone or changed: {', '.join(lost[:3])}"
    elif (out / WORK_FOLDER / _IDENTITY_NAME).is_file() or not any(out.glob("*.tar")):
        return None
    raise DataError(found, where=str(out), fix="choose another folder, or delete this one")


def check_disk(out: Path, num_bytes: int) -> None:
    """DataError if less than `num_bytes` and some reserve are free where `out` is or will be."""
    needed = num_bytes + _SPARE_BYTES
    free = free_bytes(out)
    if free < needed:
        raise DataError(
            f"not enough disk space: about {needed / 1e9:.2f} GB more needed, {free / 1e9:.2f} GB free",
            where=str(out),
            fix="free space and repeat the command, which continues; or another folder, or resize_short_side=",
        )


def _whole_lines(log: Path) -> Iterator[tuple[int, ShardReport]]:
    """(place, report) of every line; a last line cut off by a kill is no line."""
    place = 0
    with log.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                return
            yield place, ShardReport.from_json(json.loads(line))
            place += len(line)


def _has_size(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes
