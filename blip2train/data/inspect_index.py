"""Shards as they are, against what index.json and manifest.json say of them.

Implements the structure part of `blip2train data check`: missing, extra, changed and miscounted shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2train.data.finding import Findings
from blip2train.data.inspect_shard import ShardSummary
from blip2train.data.shards import INDEX_NAME
from blip2train.errors import DataError
from blip2train.run_dir import read_json

MANIFEST_NAME = "manifest.json"

Rows = Mapping[str, Mapping[str, Any]]
"""Shard name -> its row of an index: num_records, and num_bytes and sha256 where they are known."""


@dataclass
class FolderIndex:
    """What lies beside the shards of one local folder."""

    path: Path
    index: Rows = field(default_factory=dict)
    manifest: Rows = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_folder(folder: str) -> FolderIndex:
    """Read `index.json` and `manifest.json` of a local folder; both may be missing.

    Raises:
        DataError: one of them is no JSON, or has no list of shards.
    """
    path = Path(folder or ".")
    index, manifest = _read(path / INDEX_NAME), _read(path / MANIFEST_NAME)
    facts = {name: value for name, value in manifest.items() if name != "shards"}
    return FolderIndex(path, _rows(index, path / INDEX_NAME), _rows(manifest, path / MANIFEST_NAME), facts)


def compare(folder: FolderIndex, summaries: Sequence[ShardSummary], findings: Findings) -> None:
    """Add what the index and the shards of one folder disagree on.

    A shard of the index that was not asked for is only looked for. A shard that is cut off is not counted a second
    time for being shorter than it was.
    """
    for name in folder.index:
        if not (folder.path / name).is_file():
            findings.add("missing_shard", str(folder.path / name))
    if not folder.index:
        findings.add("no_index", str(folder.path))
    for name in sorted({*folder.index} ^ {*folder.manifest}) if folder.index and folder.manifest else ():
        where = "manifest.json" if name in folder.manifest else "index.json"
        findings.add("manifest_mismatch", f"{folder.path / name}: only in {where}")
    for summary in summaries:
        name = Path(summary.url).name
        row = folder.index.get(name)
        if row is None:
            if folder.index:
                findings.add("extra_shard", summary.url)
            continue
        other = folder.manifest.get(name, {})
        different = [key for key, value in row.items() if key in other and other[key] != value]
        if different:
            findings.add("manifest_mismatch", f"{summary.url}: {', '.join(different)}")
        elif summary.complete:
            _compare_shard(row, summary, findings)


def _compare_shard(row: Mapping[str, Any], summary: ShardSummary, findings: Findings) -> None:
    promised = row.get("num_records", summary.num_records)
    num_bytes, sha256 = row.get("num_bytes"), row.get("sha256")
    if promised != summary.num_records:
        findings.add("wrong_count", f"{summary.url}: {summary.num_records} records, the index says {promised}")
    elif num_bytes is not None and num_bytes != summary.size:
        findings.add("changed_shard", f"{summary.url}: {summary.size} bytes, the index says {num_bytes}")
    elif sha256 and summary.sha256 and sha256 != summary.sha256:
        findings.add("changed_shard", f"{summary.url}: another sha256 than the index says")


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded: Any = read_json(path)
    except ValueError as error:
        raise _foreign(path, str(error)) from error
    if not isinstance(loaded, dict):
        raise _foreign(path, f"a {type(loaded).__name__}")
    return loaded


def _rows(content: Mapping[str, Any], path: Path) -> Rows:
    rows = content.get("shards", [])
    try:
        return {str(row["name"]): row for row in rows}
    except (KeyError, TypeError) as error:
        raise _foreign(path, f"{type(error).__name__}: {error}") from error


def _foreign(path: Path, reason: str) -> DataError:
    return DataError(
        f"an index that is not ours ({reason})",
        where=str(path),
        fix="delete it and run `blip2train data index`, or pack the folder again",
    )
