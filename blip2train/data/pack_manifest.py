"""Reports of finished shards -> skipped.jsonl, index.json and manifest.json, which closes a data set.

Implements what a packed data set says about itself; LAVIS's data sets say nothing. Everything but `made` follows from
the source and the settings alone, whoever packed it and however often the work was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blip2train import __version__
from blip2train.data.pack_state import SKIPPED_NAME, PackFolder
from blip2train.data.pack_worker import ShardReport
from blip2train.data.shards import MANIFEST_NAME, ShardEntry, write_index
from blip2train.data.source.base import Skipped
from blip2train.data.tar_shard import sync
from blip2train.errors import DataError
from blip2train.run_dir import write_json

logger = logging.getLogger(__name__)

FORMAT = 2

_LIBRARIES = ("torch", "torchvision")


def close(
    folder: PackFolder,
    skipped: Skipped,
    listed: Path,
    notes: Mapping[str, Any],
    made: Mapping[str, Any],
) -> dict[str, Any]:
    """Write what the finished shards add up to; with the manifest, the last file, the data set counts as packed.

    Args:
        folder: with every shard finished.
        skipped: what was left out before it came to a shard, duplicates among it.
        listed: file that names each of them, as lines of skipped.jsonl.
        notes: of the source.
        made: what may differ between equal data sets: seconds, processes.

    Returns:
        The manifest.

    Raises:
        DataError: there is no record.
    """
    sums, in_rows, lines = _add_up(folder, listed)
    skipped = skipped.merged(in_rows)
    manifest = _to_manifest(folder.identity, sums, skipped, notes, made)
    if not sums.entries:
        raise DataError(
            f"nothing was packed; skipped: {manifest['skipped'] or 'nothing, there were no rows'}",
            where=f"{folder.identity['source']}",
            fix="check that the image paths in the annotations match the images; the first names are "
            f"{list(manifest['skipped_examples'].values())[:1]}",
        )
    if manifest["num_skipped"]:
        logger.warning("%s: left out %s; names in %s", folder.out, manifest["skipped"], SKIPPED_NAME)
    if lines.stat().st_size:
        lines.replace(folder.out / SKIPPED_NAME)
    write_index(folder.out, sums.entries)
    write_json(folder.out / MANIFEST_NAME, manifest)
    sync(folder.out / MANIFEST_NAME)
    sync(folder.out)
    shutil.rmtree(folder.work, ignore_errors=True)
    return manifest


def skip_line(cause: str, name: str, count: int = 1) -> str:
    """One line of skipped.jsonl; a line may stand for many."""
    return json.dumps({"cause": cause, "name": name} | ({"count": count} if count != 1 else {})) + "\n"


@dataclass
class _Sums:
    """Over the reports of all shards, in their order."""

    entries: list[ShardEntry] = field(default_factory=list)
    num_rows: int = 0
    num_captions: int = 0
    num_questions: int = 0
    seconds: float = 0.0
    formats: Counter[str] = field(default_factory=Counter)
    caption_words: Counter[int] = field(default_factory=Counter)
    short_sides: Counter[int] = field(default_factory=Counter)

    def add(self, report: ShardReport) -> None:
        if report.entry is not None:
            self.entries.append(report.entry)
        self.num_rows += report.num_rows
        self.num_captions += report.num_captions
        self.num_questions += report.num_questions
        self.seconds += report.seconds
        self.formats.update(report.formats)
        self.caption_words.update(report.caption_words)
        self.short_sides.update(report.short_sides)


def _add_up(folder: PackFolder, listed: Path) -> tuple[_Sums, Skipped, Path]:
    sums, skipped = _Sums(), Skipped()
    path = folder.work / SKIPPED_NAME
    with path.open("w", encoding="utf-8") as lines, listed.open(encoding="utf-8") as first:
        shutil.copyfileobj(first, lines)
        for report in folder.reports():
            sums.add(report)
            for cause, name in report.skipped:
                skipped.add(cause, name)
                lines.write(skip_line(cause, name))
        lines.flush()
        os.fsync(lines.fileno())
    return sums, skipped, path


def _to_manifest(
    identity: Mapping[str, Any], sums: _Sums, skipped: Skipped, notes: Mapping[str, Any], made: Mapping[str, Any]
) -> dict[str, Any]:
    digest = hashlib.sha256("".join(entry.sha256 for entry in sums.entries).encode()).hexdigest()
    return {
        "format": FORMAT,
        **identity,
        "num_rows": sums.num_rows,
        "num_records": sum(entry.num_records for entry in sums.entries),
        "num_captions": sums.num_captions,
        "num_questions": sums.num_questions,
        "num_bytes": sum(entry.num_bytes for entry in sums.entries),
        "num_skipped": sum(skipped.counts.values()),
        "skipped": dict(sorted(skipped.counts.items())),
        "skipped_examples": {cause: list(names) for cause, names in sorted(skipped.examples.items())},
        "notes": dict(notes),
        "formats": dict(sorted(sums.formats.items())),
        "caption_words": _histogram(sums.caption_words),
        "short_sides": _histogram(sums.short_sides),
        "sha256": digest,
        "shards": [asdict(entry) for entry in sums.entries],
        "made": {**made, "process_seconds": round(sums.seconds, 1), "versions": _versions()},
    }


def _histogram(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(low): counts[low] for low in sorted(counts)}


def _versions() -> dict[str, str]:
    return {"blip2train": __version__, "python": platform.python_version()} | {
        name: version(name) for name in _LIBRARIES
    }
