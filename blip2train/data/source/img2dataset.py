"""What img2dataset wrote of a list of urls (CC3M, CC12M, SBU, LAION-400M, COYO-700M, ...) -> one row per image.

Layout, from https://github.com/rom1504/img2dataset, checked against what version 1.47 writes:

    --output_format webdataset    00000.tar with 000000000.jpg (png, webp), .txt (caption) and .json per image
    --output_format files         00000/000000000.jpg, .txt, .json
    both                          00000.parquet (status and error of every url), 00000_stats.json ("count",
                                  "successes", "failed_to_download", "failed_to_resize", "status_dict"; written when
                                  the shard is whole)

The JSON has the url, caption, key, status, error_message, width and height (stored and original), exif, the hash of
the download (sha256) and the columns that --save_additional_columns names. Of it the url, the original size, the hash
and those columns are kept; EXIF, which may say where a photograph was taken, is not. Downloads that failed are no rows:
the manifest counts them by cause. Images with one sha256 share their `image_id`, so that the same picture found under
two urls is not its own negative. Several runs may lie in subfolders; the keys then start with the subfolder's name.

LAVIS has its own download scripts, and reads LAION's tars as they are.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from blip2train.data.shard_table import ShardTable
from blip2train.data.shards import IMAGE_EXTENSIONS
from blip2train.data.source.base import Fields, FileSlice, Row, Skipped, existing_folder, safe_key
from blip2train.data.source.folder import files_below, rows_beside
from blip2train.data.source.json_file import load_json
from blip2train.errors import DataError

_DROPPED = ("key", "status", "error_message", "width", "height", "exif")
_TEXTS = ("json", "txt")


class Img2DatasetSource:
    """The output folder of img2dataset.

    Args:
        folder: it, or one with several of them.
        kind: what the manifest calls it, and what image ids start with where there is no sha256.
        ignored: folders below it that are no part of it: where the shards go.

    Raises:
        DataError: it does not exist, or nothing in it is an output of img2dataset that can be packed.
    """

    def __init__(self, folder: str | Path, *, kind: str = "img2dataset", ignored: Sequence[Path] = ()) -> None:
        self.skipped = Skipped()
        self._damaged: list[str] = []
        path = Path(folder).expanduser()
        self._folder, self._kind = path if path.is_file() else existing_folder(path), kind
        self._parts = _find_parts(self._folder, ignored)
        if not self._parts:
            raise DataError(
                "a file" if path.is_file() else "neither NNNNN.tar nor NNNNN/ with NNNNN.parquet",
                where=str(path),
                fix="give the --output_folder of img2dataset, run with --output_format webdataset or files; a list of "
                "urls is fetched first: configs/data/dataset/cc3m.yaml, sbu.yaml and laion_115m.yaml have the commands",
            )
        self._stats = {part: _read_stats(part) for part in self._parts}

    def identity(self) -> dict[str, Any]:
        """Content is told by names, sizes and img2dataset's counts: hashing terabytes would take as long as packing."""
        digest = hashlib.sha256()
        for part in self._parts:
            size = part.stat().st_size if part.is_file() else part.with_suffix(".parquet").stat().st_size
            num_records = self._stats[part].get("successes")
            digest.update(os.fsencode(f"{part.relative_to(self._folder)} {size} {num_records}\n"))
        return {"kind": self._kind, "folder": str(self._folder), "sha256": digest.hexdigest()}

    def count(self) -> int | None:
        if not all(self._stats.values()):
            return None
        return sum(int(stats["successes"]) for stats in self._stats.values())

    def rows(self) -> Iterator[Row]:
        """In the order of the shards' names, inside a shard as it was written (files: by name)."""
        self.skipped, self._damaged = self.skipped.fresh(), []
        for part in self._parts:
            place = part.relative_to(self._folder).parent
            num_known = -sum(self.skipped.counts.values())
            for row in self._read_tar(part) if part.suffix == ".tar" else self._read_files(part):
                num_known += 1
                key = safe_key(str(place / row.key))
                yield Row(key, row.name, {}, row.image, row.texts, tidy=partial(_tidy, self._kind))
            num_known += sum(self.skipped.counts.values())
            promised = self._stats[part].get("successes", num_known)
            if promised > num_known:
                name = f"{part.relative_to(self._folder)}: {num_known} of {promised} images"
                self.skipped.add("missing_in_shard", name, promised - num_known)

    def notes(self) -> dict[str, Any]:
        """{"downloads": {"urls", "images", "failed": {cause: count}, "shards_without_counts"}, "damaged_shards"}; the
        last two only where there are any."""
        failed: dict[str, int] = {}
        for stats in self._stats.values():
            for cause, count in _failures(stats).items():
                failed[cause] = failed.get(cause, 0) + count
        known = [stats for stats in self._stats.values() if stats]
        downloads: dict[str, Any] = {
            "urls": sum(stats["count"] for stats in known),
            "images": sum(stats["successes"] for stats in known),
            "failed": dict(sorted(failed.items(), key=lambda item: -item[1])),
        }
        if len(known) < len(self._stats):
            downloads["shards_without_counts"] = len(self._stats) - len(known)
        return {"downloads": downloads} | ({"damaged_shards": self._damaged} if self._damaged else {})

    def _read_tar(self, path: Path) -> Iterator[Row]:
        with path.open("rb") as file:
            table = ShardTable(file)
        relative = path.relative_to(self._folder)
        if table.damage is not None:
            self._damaged.append(f"{relative}: {table.damage}")
        for index in range(len(table)):
            name = f"{relative}/{table.key(index)}"
            broken = table.broken(index)
            files = {extension: FileSlice(path, offset, size) for extension, offset, size in table.files(index)}
            image = next((files[extension] for extension in IMAGE_EXTENSIONS if extension in files), None)
            if broken is not None:
                self.skipped.add(broken[0], f"{name}: {broken[1]}")
            elif image is None:
                self.skipped.add("missing_image", f"{name}: {', '.join(files)}")
            else:
                yield Row(table.key(index), name, {}, image, {kind: files[kind] for kind in _TEXTS if kind in files})

    def _read_files(self, folder: Path) -> Iterator[Row]:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        for row in rows_beside(folder, names, self._folder, self.skipped):
            yield Row(Path(row.key).name, row.name, {}, row.image, row.texts)


def _tidy(kind: str, key: str, fields: Fields) -> Fields:
    """Leave out what says nothing of the image as it is stored, and let equal downloads have one id.

    A column `image_id` that was saved with the images is the id; else the hash of the download, else its key.
    """
    kept = {name: value for name, value in fields.items() if name not in _DROPPED and value is not None}
    digest = kept.get("sha256")
    image_id: int | str = f"{kind}/{key}"
    if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest):
        image_id = int(digest[:15], 16)  # 60 bits: a positive int64
    return {"image_id": image_id} | kept


def _find_parts(folder: Path, ignored: Sequence[Path]) -> list[Path]:
    """Tars, or the folders of `--output_format files`, to any depth and in the order of their names."""
    if not folder.is_dir():
        return []
    files = [path for path in files_below(folder, ignored) if path.suffix in (".tar", ".parquet")]
    tars = [path for path in files if path.suffix == ".tar"]
    return sorted(tars or [path.with_suffix("") for path in files if path.with_suffix("").is_dir()])


def _read_stats(part: Path) -> dict[str, Any]:
    """img2dataset's counts of a shard; nothing where it did not finish the shard, or another tool wrote it."""
    path = part.with_name(f"{part.stem}_stats.json")
    if not path.is_file():
        return {}
    stats = load_json(path)
    if not isinstance(stats, dict) or not {"count", "successes"} <= set(stats):
        raise DataError("no counts of img2dataset", where=str(path), fix="delete it, or fetch the shard again")
    return stats


def _failures(stats: Mapping[str, Any]) -> dict[str, int]:
    """Failed downloads by cause: messages that differ by host or number are one cause."""
    counts: dict[str, int] = {}
    for message, count in stats.get("status_dict", {}).items():
        if message != "success":
            cause = failure_cause(message)
            counts[cause] = counts.get(cause, 0) + count
    # img2dataset keeps a limited number of different messages
    unnamed = stats.get("count", 0) - stats.get("successes", 0) - sum(counts.values())
    return counts | ({"unnamed": unnamed} if unnamed > 0 else {})


def failure_cause(message: str) -> str:
    """A short name for img2dataset's message about one url: "http_404", "timeout", "not_decodable", ..."""
    status = re.search(r"HTTP Error (\d{3})", message)
    if status:
        return f"http_{status[1]}"
    patterns = {
        "timeout": "timed? ?out",
        "unknown_host": "Name or service|name resolution|nodename|No address|getaddrinfo",
        "certificate": "certificate|SSL|TLS",
        "connection": "Connection|refused|reset|unreachable|Remote end|IncompleteRead",
        "not_decodable": "decoding error|cannot identify|decompress",
        "not_wanted": "too small|too large|aspect ratio",
        "opted_out": "directive|noai|noindex",
        "hash_mismatch": "hash mismatch",
        "bad_url": "unknown url type|InvalidURL|control characters|no host|ascii",
    }
    return next((cause for cause, pattern in patterns.items() if re.search(pattern, message, re.IGNORECASE)), "other")
