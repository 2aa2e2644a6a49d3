"""A folder of shards that any number of processes fill: who takes which shard, what is done, and when all is.

Implements the bookkeeping of CapFilt at the paper's scale (129 million images). A process may be killed at any moment,
and the same command continues; the result does not depend on who did what. A folder belongs to the settings it was
begun with as soon as a shard is written or in work; a call that was refused before that leaves it free.

    out/shard-000000.tar ...     one per input shard, in the order of the inputs
    out/.capfilt/settings.json   what this folder is: inputs, models, settings
    out/.capfilt/000000.json     marker: the shard is whole; its account (`ShardResult`)
    out/.capfilt/000000.lock     the shard is taken; holds the number of records read so far
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blip2train.capfilt.shard import ShardResult
from blip2train.data.file_lock import take_lock
from blip2train.data.shards import INDEX_NAME, MANIFEST_NAME, Shard
from blip2train.errors import DataError
from blip2train.nested import differences
from blip2train.run_dir import read_json, write_json

log = logging.getLogger(__name__)

_STATE_FOLDER = ".capfilt"

ProcessShard = Callable[[Shard, Path, Callable[[int], None]], ShardResult]
"""(input, path of the output, progress) -> its account."""


class Job:
    """The shards to do and those done.

    Args:
        shards: inputs in their order.
        out: folder of the outputs.
        identity: everything that the outputs depend on, as plain JSON; what lies in `out` must have the same.
        prefix: start of every output shard's name.
    """

    def __init__(
        self, shards: Sequence[Shard], out: str | Path, identity: Mapping[str, Any], prefix: str = "shard"
    ) -> None:
        self.shards, self.out, self._prefix = list(shards), Path(out), prefix
        self.identity = {"prefix": prefix, "inputs": _inputs(self.shards), **identity}
        self._state = self.out / _STATE_FOLDER
        self._settings = self._state / "settings.json"
        self._read: dict[int, int] = {}

    @property
    def num_records(self) -> int:
        """Records of all inputs."""
        return sum(shard.num_records for shard in self.shards)

    def prepare(self) -> None:
        """Make the folder this job's own.

        Raises:
            DataError: it holds another job, or other shards.
        """
        if self.out.exists() and not self.out.is_dir():
            raise DataError("a file where a folder is meant", where=str(self.out), fix="choose another out=")
        if not self._settings.is_file():
            found = self._foreign()
            if found:
                raise DataError(
                    f"a folder that holds another data set ({', '.join(found[:3])})",
                    where=str(self.out),
                    fix="choose another folder for out=, or delete this one",
                )
            write_json(self._settings, self.identity)
        if self._changed() and not self._is_begun():
            self._begin_anew()
        changed = self._changed()  # again: another process of this call may have been first
        if changed:
            raise DataError(
                f"a folder begun with other settings ({'; '.join(changed[:4])})",
                where=str(self.out),
                fix="repeat the call with the settings it was begun with, choose another out=, or delete this one",
            )

    def work(
        self,
        process: ProcessShard,
        rank: int,
        world: int,
        progress: Callable[[], None],
        prefetch: Callable[[Shard], None] = lambda shard: None,
    ) -> None:
        """Do shards until none is left that nobody has taken: first every `world`-th one, then others' leftovers.

        Args:
            process: does one shard.
            rank: of this process.
            world: number of processes.
            progress: called often.
            prefetch: called with the own shard that comes after the one about to be done.

        Raises:
            DataError: a call with other settings has begun the folder anew since `prepare`.
        """
        own = range(rank, len(self.shards), world)
        mine = set(own)
        for index in [*own, *(index for index in range(len(self.shards)) if index not in mine)]:
            if index + world in mine and not self._has(index + world):
                prefetch(self.shards[index + world])
            with self._claim(index, is_own=index in mine) as lock:
                if lock is not None:
                    self._do(index, process, lock, progress)
            progress()

    def results(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The markers of the shards that are done, in order."""
        for index in range(len(self.shards)):
            if self._marker(index).is_file():
                yield index, read_json(self._marker(index))

    def is_done(self) -> bool:
        """Every shard has its marker, and is still there."""
        return all(self._has(index) for index in range(len(self.shards)))

    def num_read(self) -> int:
        """Records that all processes together have read, as far as their files say."""
        taken = 0
        for index in range(len(self.shards)):
            if index in self._read:
                continue
            if self._marker(index).is_file():
                self._read[index] = read_json(self._marker(index))["num_read"]
            else:
                taken += _number(self._marker(index).with_suffix(".lock"))
        return sum(self._read.values()) + taken

    def _do(self, index: int, process: ProcessShard, lock: int, progress: Callable[[], None]) -> None:
        def note(num_read: int) -> None:
            os.pwrite(lock, f"{num_read:<12}".encode(), 0)
            progress()

        out = self._output(index)
        for left_over in self.out.glob(f".{out.name}.*.partial"):  # of a killed process: nobody else has this shard
            left_over.unlink()
        try:
            result = process(self.shards[index], out, note)
        except BaseException:
            out.unlink(missing_ok=True)  # without its marker it is no result
            raise
        write_json(self._marker(index), {"url": self.shards[index].url} | result.as_dict())

    @contextmanager
    def _claim(self, index: int, *, is_own: bool) -> Iterator[int | None]:
        """Hold a shard's lock file, or yield None where it is done or another process holds it.

        A file system without locks leaves every process its own share.
        """
        if self._has(index):
            yield None
            return
        path = self._marker(index).with_suffix(".lock")
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # a lock that was free may be that of a process which has just finished the shard
            free = _take(lock, or_else=is_own) and not self._has(index)
            if free and self._changed():
                raise DataError(
                    f"another call has begun this folder anew, with other settings ({'; '.join(self._changed()[:4])})",
                    where=str(self.out),
                    fix="choose another out= for one of the two",
                )
            yield lock if free else None
            if free:
                path.unlink(missing_ok=True)
        finally:
            os.close(lock)

    def _is_begun(self) -> bool:
        """Something came out of a shard, or a process has one in hand."""
        if self._foreign() or any(read_json(path)["entry"] is not None for path in self._markers()):
            return True
        return any(_is_held(path) for path in self._state.glob("*.lock"))

    def _begin_anew(self) -> None:
        changed = "; ".join(self._changed()[:4])
        log.info("%s: begun anew, for nothing came of the settings it was begun with (%s)", self.out, changed)
        for left_over in (*self._markers(), *self.out.glob(".*.tar.*.partial")):
            left_over.unlink(missing_ok=True)
        write_json(self._settings, self.identity)

    def _markers(self) -> Iterator[Path]:
        return self._state.glob("[0-9]*.json")

    def _foreign(self) -> list[str]:
        """Names of what makes the folder a data set."""
        paths = [*self.out.glob("*.tar"), *(self.out / name for name in (INDEX_NAME, MANIFEST_NAME))]
        return [path.name for path in paths if path.exists()]

    def _changed(self) -> list[str]:
        """Settings in which the folder differs from this job."""
        changed = differences(read_json(self._settings), self.identity)
        return [f"{name}: {there!r} there, {now!r} now" for name, (there, now) in changed.items()]

    def _has(self, index: int) -> bool:
        marker = self._marker(index)
        # of a shard without a usable record nothing was written
        return marker.is_file() and (self._output(index).is_file() or read_json(marker)["entry"] is None)

    def _output(self, index: int) -> Path:
        return self.out / f"{self._prefix}-{index:06d}.tar"

    def _marker(self, index: int) -> Path:
        return self._state / f"{index:06d}.json"


def _take(lock: int, *, or_else: bool) -> bool:
    try:
        return take_lock(lock)
    except OSError:
        return or_else


def _is_held(path: Path) -> bool:
    """Whether a process holds this lock file; on a file system without locks, whether it is there."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _take(file, or_else=False)
    finally:
        os.close(file)


def _number(path: Path) -> int:
    try:
        return int(path.read_text() or 0)
    except (OSError, ValueError):
        return 0


def _inputs(shards: Sequence[Shard]) -> dict[str, Any]:
    """Names and, of local files, sizes; as one digest, for there may be 100,000."""
    digest = hashlib.sha256()
    for shard in shards:
        path = Path(shard.url)
        digest.update(f"{shard.url}\0{path.stat().st_size if path.is_file() else ''}\0".encode())
    return {"num_shards": len(shards), "first": shards[0].url, "sha256": digest.hexdigest()}
