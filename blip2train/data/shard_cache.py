"""Shard -> open local file: remote shards are downloaded once per machine, into a folder of bounded size.

Implements the local side of remote storage. A copy appears under its name only when it is whole and its checksum, where
an index knows it, is right; processes that want the same shard at once wait for one download; the copies used longest
ago make room. Files that are open stay readable when their name goes. webdataset's own cache knows no bound that holds
across processes, and no checksum.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import hashlib
import logging
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from blip2train.data.file_lock import release_lock, take_lock
from blip2train.data.remote import Remote, is_remote
from blip2train.data.shard_copy import is_packed, is_right, list_copies, open_copy, uncompress
from blip2train.data.shard_index import Shard
from blip2train.errors import Blip2TrainError, ConfigError, DataError
from blip2train.run_dir import free_bytes

logger = logging.getLogger(__name__)


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_SPARE_BYTES = 256 << 20
_GB = 10**9


class ShardCache:
    """Hands out local files for shards, wherever they lie. Local tars are opened in place.

    Safe to use from many processes and threads at once, on the same folder.

    Args:
        folder: of the copies; None: `$BLIP2TRAIN_CACHE/shards`, by default `~/.cache/blip2train/shards`.
        max_gb: size cap of the folder, in 1e9 bytes. Give it room for the shards that all workers of the machine have
            open at a time: a copy that has to go too early is downloaded again.
        attempts: downloads of a shard before the run stops.
        wait_s: seconds before the second attempt; doubled for each further one, with jitter.
        timeout_s: seconds without a byte before an attempt has failed.
        prefetch_threads: downloads in the background at a time, per process.
        storage_options: for fsspec, see `remote.Remote`.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        max_gb: float = 100.0,
        *,
        attempts: int = 5,
        wait_s: float = 1.0,
        timeout_s: float = 60.0,
        prefetch_threads: int = 2,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if max_gb <= 0 or prefetch_threads < 1:
            raise ConfigError(
                f"max_gb={max_gb}, prefetch_threads={prefetch_threads}",
                where="data.cache",
                fix="give a positive size and at least one thread",
            )
        home = Path(os.environ.get("BLIP2TRAIN_CACHE", "~/.cache/blip2train")) / "shards"
        self.folder = Path(folder or home).expanduser()
        self.max_bytes = round(max_gb * _GB)
        self.remote = Remote(storage_options or {}, attempts, wait_s, timeout_s=timeout_s)
        self._num_threads = prefetch_threads
        self._wanted: queue.SimpleQueue[Shard] | None = None
        self._asked: set[str] = set()
        self._process = 0  # whose threads take from the queue; a forked worker has none of them

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_wanted": None, "_asked": set()}

    def with_options(self, storage_options: Mapping[str, Any]) -> ShardCache:
        """The same folder, for stores that need these `storage_options`."""
        other = copy.copy(self)
        other.remote = dataclasses.replace(self.remote, options=storage_options)
        other._wanted, other._asked = None, set()
        return other

    def open(self, shard: Shard | str) -> BinaryIO:
        """The shard's bytes, uncompressed. The file stays good even if its copy is removed meanwhile.

        Raises:
            DataError: it cannot be fetched, is not what its index says, or finds no room.
            OSError: a local shard cannot be opened.
        """
        shard = _shard(shard)
        if not self._is_copied(shard.url):
            return Path(shard.url).open("rb")
        path = self._path(shard)
        found = open_copy(path, shard)
        if found is not None:
            return found
        with self._lock(path):
            return open_copy(path, shard) or self._fetch(shard, path)

    def local_path(self, shard: Shard | str) -> Path:
        """Where the shard lies on this machine, fetched if need be. A copy may be removed when others need the room:
        `open` is sure."""
        shard = _shard(shard)
        self.open(shard).close()
        return self._path(shard) if self._is_copied(shard.url) else Path(shard.url)

    def prefetch(self, shards: Iterable[Shard | str]) -> None:
        """Fetch shards in the background, in this order; what fails is logged, and tried again when it is opened."""
        remote = {shard.url: shard for shard in map(_shard, shards) if self._is_copied(shard.url)}
        if not remote:
            return
        if self._wanted is None or self._process != os.getpid():
            self._wanted, self._process = queue.SimpleQueue(), os.getpid()
            self._asked.clear()
            for _ in range(self._num_threads):
                # daemons: a download must not hold up a worker that is told to stop
                threading.Thread(target=self._work, args=(self._wanted,), daemon=True).start()
        for url, shard in remote.items():
            if url not in self._asked:
                self._asked.add(url)
                self._wanted.put(shard)

    def _work(self, wanted: queue.SimpleQueue[Shard]) -> None:
        while True:
            shard = wanted.get()
            try:
                self.open(shard).close()
            except (Blip2TrainError, OSError) as error:
                logger.info("prefetching %s: %s", shard.url, str(error).splitlines()[0])
            self._asked.discard(shard.url)

    def _is_copied(self, url: str) -> bool:
        return is_remote(url) or is_packed(url)

    def _path(self, shard: Shard) -> Path:
        identity = shard.url
        if not is_remote(shard.url):
            facts = Path(shard.url).stat()
            identity = f"{Path(shard.url).absolute()}/{facts.st_mtime_ns}/{facts.st_size}"
        digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self.folder / f"{digest}.tar"

    @contextmanager
    def _lock(self, path: Path, wait: bool = True) -> Iterator[bool]:
        """Hold the lock that a copy shares with a few others; yields whether it was had."""
        folder = self.folder / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / path.name[:3]).open("w")
        except OSError as error:
            raise _no_folder(self.folder, error) from error
        with file:
            try:
                free = take_lock(file, wait=wait)
            except OSError as error:
                raise DataError(
                    f"a cache folder on a disk without locks ({error.strerror})",
                    where=str(self.folder),
                    fix="set data.cache.folder to one on a disk of this machine",
                ) from error
            try:
                yield free
            finally:
                if free:
                    release_lock(file)

    def _fetch(self, shard: Shard, path: Path) -> BinaryIO:
        """Bring a copy into place; the lock is held."""
        partial, plain = path.with_suffix(".partial"), path.with_suffix(".plain")
        try:
            if is_remote(shard.url):
                self._download(shard, partial)
            if is_packed(shard.url):
                uncompress(partial if is_remote(shard.url) else Path(shard.url), plain)
                plain.replace(partial)
            self._make_room(0)
            partial.replace(path)
            return path.open("rb")
        except OSError as error:
            if is_remote(shard.url) or error.errno in _NO_ROOM:
                raise _no_folder(self.folder, error) from error
            raise
        finally:
            partial.unlink(missing_ok=True)
            plain.unlink(missing_ok=True)

    def _download(self, shard: Shard, partial: Path) -> None:
        for last in (False, True):
            with partial.open("w+b") as sink:
                self.remote.fetch(
                    shard.url, sink, num_bytes=shard.num_bytes, on_size=lambda size: self._reserve(partial, size)
                )
                sink.truncate()
                os.fsync(sink.fileno())
            if is_right(partial, shard, last):
                return

    def _reserve(self, partial: Path, size: int) -> None:
        """Make room for a file, and let it count as whole from now on."""
        if size > self.max_bytes:
            raise DataError(
                f"a shard of {size / _GB:.2f} GB for a cache of {self.max_bytes / _GB:.2f} GB",
                where=str(self.folder),
                fix="raise data.cache.max_gb",
            )
        self._make_room(size - partial.stat().st_size)
        os.truncate(partial, size)

    def _make_room(self, num_bytes: int) -> None:
        """Remove the copies used longest ago until the cap and the disk have room for so many bytes more."""
        with self._lock(Path("evict")):
            files = sorted(list_copies(self.folder), key=lambda found: found[2])
            total = sum(size for _, size, _ in files)
            for path, size, _ in files:
                if total + num_bytes <= self.max_bytes and self._disk_has(num_bytes):
                    return
                with self._lock(path, wait=False) as free:
                    if free:
                        path.unlink(missing_ok=True)
                        total -= size
        if not self._disk_has(num_bytes):
            raise DataError(
                f"not enough disk space: {num_bytes / _GB:.2f} GB needed, {free_bytes(self.folder) / _GB:.2f} GB free",
                where=str(self.folder),
                fix="free space, or choose another folder (data.cache.folder)",
            )

    def _disk_has(self, num_bytes: int) -> bool:
        return num_bytes <= 0 or free_bytes(self.folder) >= num_bytes + _SPARE_BYTES


def _shard(shard: Shard | str) -> Shard:
    return shard if isinstance(shard, Shard) else Shard(shard, 0)


def _no_folder(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"a cache folder that cannot be written ({error.strerror})", where=str(folder), fix="set data.cache.folder"
    )
