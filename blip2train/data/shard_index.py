"""What lies beside the shards and says how many records they hold: our `index.json`, img2dataset's and webdataset's.

Implements what makes a position in the data arithmetic: with the counts known, any sample can be found without reading
those before it. LAVIS keeps no index.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blip2train.errors import DataError
from blip2train.run_dir import write_json

INDEX_NAME = "index.json"
MANIFEST_NAME = "manifest.json"
"""What a folder of shards was made from, and how; `data pack` and CapFilt write it last."""
SIZES_NAME = "sizes.json"

UNCOUNTED = -1
"""Stands for the number of records while a shard is being counted."""

IndexRows = dict[str, "ShardEntry"]
"""Shard name (its file name, or its whole url) -> its row."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar.

    Args:
        url: path or url.
        num_records: how many records it holds.
        num_bytes: its size, if an index says so; a download of another size is not taken.
        sha256: of its bytes, if an index says so; a download is compared with it.
    """

    url: str
    num_records: int
    num_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One row of `index.json`; `sha256` is empty where it was not asked for."""

    name: str
    num_records: int
    num_bytes: int
    sha256: str


def write_index(folder: Path, entries: Sequence[ShardEntry]) -> None:
    """Write `index.json`, keeping the entries of other shards that lie in the same folder."""
    path = folder / INDEX_NAME
    names = {entry.name for entry in entries}
    known = parse_index(path.read_bytes(), str(path)) if path.is_file() else {}
    others = [row for name, row in known.items() if name not in names and (folder / name).is_file()]
    write_rows(path, [*others, *entries])


def write_rows(path: Path, entries: Sequence[ShardEntry], damaged: Mapping[str, str] | None = None) -> None:
    """Write an index of exactly these shards, wherever they lie.

    Args:
        path: of the file.
        entries: one per shard, in any order.
        damaged: what is wrong with some of them, by name; for people, and for the next `data index`.
    """
    rows = [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.name)]
    content = {"format": 1, "num_records": sum(row["num_records"] for row in rows), "shards": rows}
    write_json(path, content | ({"damaged": dict(damaged)} if damaged else {}))


def parse_index(content: bytes, where: str) -> IndexRows:
    """The rows of an `index.json`.

    Raises:
        DataError: it is no such file.
    """
    try:
        rows = [
            ShardEntry(row["name"], _count(row["num_records"]), int(row.get("num_bytes", 0)), row.get("sha256", ""))
            for row in json.loads(content)["shards"]
        ]
        return {row.name: row for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"an index that is not ours ({type(error).__name__}: {error})",
            where=where,
            fix="delete it, and write another with `blip2train data index urls=...`",
        ) from error


def parse_damaged(content: bytes) -> dict[str, str]:
    """What an `index.json` that `parse_index` could read says of damaged shards, by name."""
    found = json.loads(content).get("damaged", {})
    return {str(name): str(text) for name, text in found.items()} if isinstance(found, dict) else {}


def parse_sizes(content: bytes, where: str) -> dict[str, int]:
    """webdataset's `sizes.json`: file name -> number of records.

    Raises:
        DataError: it is no such file.
    """
    try:
        loaded: Mapping[str, Any] = json.loads(content)
        return {name: _count(number) for name, number in loaded.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"no table of record counts ({type(error).__name__}: {error})", where=where, fix="repair or delete it"
        ) from error


def stats_name(shard: str) -> str:
    """Name of the file that img2dataset writes beside `00000.tar`: `00000_stats.json`."""
    return f"{shard.split('.')[0]}_stats.json"


def parse_stats(content: bytes, where: str) -> int:
    """Number of records of an img2dataset shard: what it downloaded and could resize.

    Raises:
        DataError: it is no such file.
    """
    try:
        return _count(json.loads(content)["successes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"no statistics of img2dataset ({type(error).__name__}: {error})", where=where, fix="repair or delete it"
        ) from error


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} records")
    return value
