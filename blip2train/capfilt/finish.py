"""Markers of all shards -> index.json, manifest.json, drops.jsonl and report.json.

Implements the end of CapFilt: from here on the folder is a data set as `data pack` would have left it. Running it twice
gives the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from blip2train.capfilt.example import Examples
from blip2train.capfilt.item import DATASET
from blip2train.capfilt.job import Job
from blip2train.capfilt.statistics import Statistics, add_up, summarise
from blip2train.data.drop import DropLedger
from blip2train.data.shards import MANIFEST_NAME, ShardEntry, write_index
from blip2train.errors import DataError
from blip2train.run_dir import write_json

DROPS_NAME = "drops.jsonl"
REPORT_NAME = "report.json"
_MINIMUM_RECORDS = 100


def new_ledger(job: Job, max_dropped_share: float) -> DropLedger:
    """Counts of what earlier calls had done, so that the allowed share is judged over all of it."""
    ledger = DropLedger([DATASET], max_dropped_share, setting="max_dropped_share")
    counts: dict[str, int] = {"used": 0}
    for _, marker in job.results():
        counts["used"] += marker["num_read"] - len(marker["drops"])
        for drop in marker["drops"]:
            counts[drop["cause"]] = counts.get(drop["cause"], 0) + 1
    ledger.load({DATASET: counts})
    return ledger


def finish(job: Job, max_dropped_share: float) -> dict[str, Any]:
    """Write what a whole job leaves behind; returns the manifest.

    Raises:
        DataError: a shard is not done, more records than allowed were dropped, or no record is left.
    """
    if not job.is_done():
        raise DataError("shards are missing", where=str(job.out), fix="repeat the command: it continues")
    entries: list[ShardEntry] = []
    rows: list[dict[str, Any]] = []
    statistics, examples, dropped = Statistics(), Examples(), Counter[str]()
    num_read = 0
    with _writing(job.out / DROPS_NAME) as drops:
        for _, marker in job.results():
            num_read += marker["num_read"]
            for drop in marker["drops"]:
                dropped[drop["cause"]] += 1
                drops.write(json.dumps(drop) + "\n")
            statistics = add_up([statistics.as_dict(), marker["statistics"]])
            if marker["entry"] is not None:
                entries.append(ShardEntry(**marker["entry"]))
                rows.append(marker["entry"] | {"source": marker["url"]})
                examples.merge(marker["examples"], marker["entry"]["name"])
    _judge(job, num_read, dropped, max_dropped_share)
    if not entries:
        raise DataError(
            f"no record is left of {len(job.shards)} shards",
            where=str(job.out),
            fix=f"see {DROPS_NAME} there for why; lower rule.min_score or rule.min_words if they left nothing",
        )
    manifest = _manifest(job, rows, statistics, dropped)
    write_index(job.out, entries)
    report = {
        "summary": summarise(statistics),
        "dropped": manifest["dropped"],
        "statistics": statistics.as_dict(),
        "examples": examples.as_dict(),
    }
    write_json(job.out / REPORT_NAME, report)
    write_json(job.out / MANIFEST_NAME, manifest)
    return manifest


def _judge(job: Job, num_read: int, dropped: Counter[str], max_dropped_share: float) -> None:
    """Several processes may each have stayed below the limit that all together are above."""
    if num_read >= _MINIMUM_RECORDS and dropped.total() > max_dropped_share * num_read:
        causes = ", ".join(f"{count} {cause}" for cause, count in sorted(dropped.items()))
        raise DataError(
            f"{dropped.total()} of {num_read} records cannot be used ({causes}); allowed share is "
            f"{max_dropped_share:g}",
            where=str(job.out / DROPS_NAME),
            fix="repair the input (`blip2train data check` names every defect), or raise max_dropped_share",
        )


@contextmanager
def _writing(path: Path) -> Iterator[TextIO]:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="ascii") as file:
        yield file
    partial.replace(path)


def _manifest(job: Job, rows: list[dict[str, Any]], statistics: Statistics, dropped: Counter[str]) -> dict[str, Any]:
    digest = hashlib.sha256("".join(row["sha256"] for row in rows).encode()).hexdigest()
    return {
        "format": 1,
        "kind": "capfilt",
        "settings": job.identity,
        "num_records": sum(row["num_records"] for row in rows),
        "num_captions": statistics.counts["captions_kept"],
        "num_bytes": sum(row["num_bytes"] for row in rows),
        "num_dropped": dropped.total(),
        "dropped": dict(sorted(dropped.items())),
        "counts": dict(sorted(statistics.counts.items())),
        "sha256": digest,
        "shards": rows,
    }
