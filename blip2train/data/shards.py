"""Shard files <-> records: the only door to webdataset, read and written in one place.

Implements the storage of the data path: plain WebDataset tars, so that img2dataset, open_clip and Energon read ours
and we theirs. Beside our own shards lies `index.json` (records and sha256 per shard), which makes resuming fast. LAVIS
reads shards with webdataset's resampling pipeline: its order cannot be repeated or resumed.
"""

from __future__ import annotations

import glob
import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import webdataset as wds

from blip2train.errors import ConfigError, DataError
from blip2train.run_dir import read_json, write_json

RawRecord = dict[str, Any]
"""`__key__`, `__url__`, and undecoded bytes by extension: "jpg" (or "png", "webp", ...), "json", "txt"."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif")
INDEX_NAME = "index.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar and how many records it holds, if an index beside it says so."""

    url: str
    num_records: int | None


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One row of `index.json`."""

    name: str
    num_records: int
    num_bytes: int
    sha256: str


def expand_urls(urls: str | Sequence[str]) -> list[str]:
    """Expand braces, globs and folders to a list of shards in a fixed order; remote urls pass unchecked.

    Raises:
        ConfigError: no url at all.
        DataError: local shards that do not exist, by name.
    """
    patterns = [urls] if isinstance(urls, str) else list(urls)
    if not patterns:
        raise ConfigError("an empty list of shards", where="urls", fix="give at least one path, glob or url of a .tar")
    expanded: list[str] = []
    missing: list[str] = []
    for pattern in patterns:
        for url in wds.shardlists.expand_urls(pattern) if _is_remote(pattern) else _braces(pattern):
            found = _find(url)
            expanded += found
            if not found:
                missing.append(url)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise DataError(
            f"{len(missing)} of the shards do not exist: {shown}",
            where=f"urls={', '.join(patterns)} (working folder {Path.cwd()})",
            fix="check the path, or make shards with `blip2train data pack`",
        )
    return expanded


def open_shards(urls: str | Sequence[str]) -> list[Shard]:
    """Expand `urls` and look up each shard's record count in the `index.json` beside it, where there is one."""
    expanded = expand_urls(urls)
    folders = {Path(url).parent for url in expanded if not _is_remote(url)}
    counts = {
        folder / row["name"]: row["num_records"] for folder in folders for row in _read_index(folder / INDEX_NAME)
    }
    return [Shard(url, None if _is_remote(url) else counts.get(Path(url))) for url in expanded]


def read_shard(url: str) -> Iterator[RawRecord]:
    """Yield the undecoded records of one tar in file order.

    Raises:
        DataError: the tar is missing, cut off, no tar, or holds two files of the same name.
    """
    try:
        for record in wds.tariterators.tarfile_samples([{"url": url}]):
            record["__url__"] = url
            yield record
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = str(error.args[0]) if error.args else type(error).__name__
        raise DataError(
            f"a shard that cannot be read ({reason})",
            where=url,
            fix="copy or pack it again; index.json holds its sha256",
        ) from error


class ShardWriter:
    """Writes `<prefix>-000000.tar`, ... and, on leaving the `with` block without an error, `index.json`.

    A shard appears under its name only when it is complete. Times and owners are fixed: equal records give equal bytes.

    Args:
        folder: created if missing.
        prefix: start of every shard's name.
        samples_per_shard: records per tar; the last one may hold fewer.
        finished: entries of shards that an interrupted run left behind; writing goes on after them.
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str = "shard",
        samples_per_shard: int = 1000,
        finished: Sequence[ShardEntry] = (),
    ) -> None:
        if samples_per_shard < 1:
            raise ConfigError(f"samples_per_shard={samples_per_shard}", where="ShardWriter", fix="give 1 or more")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.entries = list(finished)
        self._prefix = prefix
        self._samples_per_shard = samples_per_shard
        self._tar: wds.TarWriter | None = None
        self._partial = self.folder / f".{prefix}.partial"
        self._in_shard = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish_shard()
            write_index(self.folder, self.entries)
        elif self._tar is not None:
            self._tar.close()
            self._partial.unlink(missing_ok=True)

    def write(self, key: str, image: bytes, extension: str, json: bytes) -> bool:
        """Append one record; returns True when this completed a shard.

        Args:
            key: unique in the data set; no dot, which ends a key in a tar, and no leading "__".
            image: encoded image.
            extension: of `image`, without a dot.
            json: the encoded record (see `data/sample.py` for its fields).
        """
        if not key or "." in key or key.startswith("__"):
            raise DataError(
                f"record key {key!r}", where="ShardWriter", fix="use a non-empty key without dots or leading __"
            )
        if self._tar is None:
            # an integer: a float would add an extended header to every file
            self._tar = wds.TarWriter(str(self._partial), encoder=False, mtime=0)
        self._tar.write({"__key__": key, extension: image, "json": json})
        self._in_shard += 1
        if self._in_shard == self._samples_per_shard:
            self.finish_shard()
            return True
        return False

    def finish_shard(self) -> None:
        """Complete the shard being written, if it holds a record."""
        if self._tar is None:
            return
        self._tar.close()
        path = self.folder / f"{self._prefix}-{len(self.entries):06d}.tar"
        with self._partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.entries.append(ShardEntry(path.name, self._in_shard, self._partial.stat().st_size, digest))
        self._partial.replace(path)
        self._tar, self._in_shard = None, 0


def write_index(folder: Path, entries: Sequence[ShardEntry]) -> None:
    """Write `index.json`, keeping the entries of other shards that lie in the same folder."""
    path = folder / INDEX_NAME
    names = {entry.name for entry in entries}
    others = [row for row in _read_index(path) if row["name"] not in names and (folder / row["name"]).is_file()]
    rows = sorted([*others, *map(asdict, entries)], key=lambda row: str(row["name"]))
    write_json(path, {"format": 1, "num_records": sum(row["num_records"] for row in rows), "shards": rows})


def _read_index(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        rows: list[dict[str, Any]] = read_json(path)["shards"]
        return [row for row in rows if isinstance(row["name"], str) and isinstance(row["num_records"], int)]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"an index that is not ours ({type(error).__name__}: {error})",
            where=str(path),
            fix="delete it (resuming is then slower), or pack the folder again",
        ) from error


def _is_remote(url: str) -> bool:
    return url.startswith("pipe:") or "://" in url


def _braces(pattern: str) -> list[str]:
    expanded: list[str] = wds.shardlists.expand_urls(str(Path(pattern).expanduser()))
    return expanded


def _find(url: str) -> list[str]:
    if _is_remote(url):
        return [url]
    path = Path(url)
    if path.is_dir():
        return [str(found) for found in sorted(path.glob("*.tar"))]
    if path.is_file():
        return [url]
    return sorted(glob.glob(url))  # noqa: PTH207 (a pattern may be absolute)
