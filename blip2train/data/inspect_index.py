"""Shards as they are, against what index.json and manifest.json say of them.

Implements the structure part of `blip2train data check`: missing, extra, changed and miscounted shards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blip2train.data.finding import Findings
from blip2train.data.inspect_shard import ShardSummary
from blip2train.data.remote import Remote, beside, is_remote
from blip2train.data.shard_count import read_stats
from blip2train.data.shard_index import (
    INDEX_NAME,
    MANIFEST_NAME,
    SIZES_NAME,
    UNCOUNTED,
    Shard,
    parse_index,
    parse_sizes,
)
from blip2train.data.shard_reader import file_name
from blip2train.errors import DataError

Rows = Mapping[str, Mapping[str, Any]]
"""Shard name -> its row: num_records, and num_bytes and sha256 where they are known."""


@dataclass
class FolderIndex:
    """What lies beside the shards of one folder.

    Args:
        name: the folder, local or remote.
        index: rows of index.json, or the counts of img2dataset's or webdataset's own files.
        manifest: the shards of manifest.json.
        facts: the rest of manifest.json.
    """

    name: str
    index: Rows
    manifest: Rows
    facts: Mapping[str, Any]

    def shard(self, url: str) -> Shard:
        """A shard of this folder with what the index promises of it."""
        row = self.index.get(file_name(url), {})
        return Shard(url, row.get("num_records", UNCOUNTED), row.get("num_bytes") or None, row.get("sha256") or None)


def read_folder(urls: Sequence[str], remote: Remote, index: str | None = None) -> FolderIndex:
    """Read what lies beside some shards of one folder; all of it may be missing.

    Args:
        urls: the shards.
        remote: reaches stores.
        index: path or url of an index that lies elsewhere.

    Raises:
        DataError: an index that is none.
    """
    where = {name: beside(urls[0], name) for name in (INDEX_NAME, SIZES_NAME, MANIFEST_NAME)}
    where[INDEX_NAME] = index or where[INDEX_NAME]
    found = {name: remote.read(place) for name, place in where.items()}
    rows: Rows = {}
    if (content := found[INDEX_NAME]) is not None:
        rows = {name: asdict(row) for name, row in parse_index(content, where[INDEX_NAME]).items()}
        if index:
            rows = {file_name(url): rows.get(url, rows.get(file_name(url), {})) for url in urls}
    elif index:
        raise DataError("an index that does not exist", where=f"index={index}", fix="check the path")
    elif (content := found[SIZES_NAME]) is not None:
        rows = {name: {"num_records": count} for name, count in parse_sizes(content, where[SIZES_NAME]).items()}
    else:
        rows = {file_name(url): {"num_records": count} for url, count in read_stats(urls, remote).items()}
    manifest = _parse_manifest(found[MANIFEST_NAME], where[MANIFEST_NAME])
    packed = {row["name"]: row for row in manifest.pop("shards", []) if isinstance(row, dict) and "name" in row}
    return FolderIndex(beside(urls[0], ""), rows, packed, manifest)


def compare(folder: FolderIndex, summaries: Sequence[ShardSummary], findings: Findings) -> None:
    """Add what the index and the shards of one folder disagree on.

    A shard of the index that was not asked for is only looked for. A shard that is cut off is not counted a second
    time for being shorter than it was.
    """
    if not is_remote(folder.name):
        for name in folder.index:
            if not (Path(folder.name) / name).is_file():
                findings.add("missing_shard", f"{folder.name}/{name}")
    if not folder.index:
        findings.add("no_index", folder.name)
    for name in sorted({*folder.index} ^ {*folder.manifest}) if folder.index and folder.manifest else ():
        where = MANIFEST_NAME if name in folder.manifest else INDEX_NAME
        findings.add("manifest_mismatch", f"{folder.name}/{name}: only in {where}")
    for summary in summaries:
        name = file_name(summary.url)
        row = folder.index.get(name)
        if summary.findings.counts["unreachable_shard"]:
            continue
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
    num_bytes, sha256 = row.get("num_bytes") or None, row.get("sha256")
    if promised != summary.num_records:
        findings.add("wrong_count", f"{summary.url}: {summary.num_records} records, the index says {promised}")
    elif summary.size is not None and num_bytes not in (None, summary.size):
        findings.add("changed_shard", f"{summary.url}: {summary.size} bytes, the index says {num_bytes}")
    elif sha256 and summary.sha256 and sha256 != summary.sha256:
        findings.add("changed_shard", f"{summary.url}: another sha256 than the index says")


def _parse_manifest(content: bytes | None, where: str) -> dict[str, Any]:
    if content is None:
        return {}
    try:
        loaded = json.loads(content)
    except ValueError as error:
        raise DataError(f"no JSON ({error})", where=where, fix="delete it, or pack the folder again") from error
    return loaded if isinstance(loaded, dict) else {}
