"""Shards -> an inspection: everything that a check can find, within one shard and between all of them.

Implements `blip2train data check` and the numbers of `data view`, in as many processes as there are cores. A data set
is a folder: keys and image ids are judged within one, images and captions across all. Nothing is written.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from blip2train.data.finding import KINDS, SEVERITIES, Findings, Unit
from blip2train.data.inspect_duplicate import find_duplicates
from blip2train.data.inspect_index import FolderIndex, compare, read_folder
from blip2train.data.inspect_record import CheckSettings
from blip2train.data.inspect_shard import CountTokens, ShardSummary, inspect_shard, merged_histograms
from blip2train.data.remote import beside
from blip2train.data.shard_index import UNCOUNTED
from blip2train.data.shards import Shard, ShardCache
from blip2train.data.worker_process import end_with_parent, run_tasks, worker_context, worker_pool

Progress = Callable[[int, int | None, int | None], None]
"""Called with (records done, records in all if known, bytes of images done)."""

_RECORDS_PER_WORKER = 5000
"""A process takes seconds to start; this many records pay for it."""


@dataclass
class Inspection:
    """What was found in some shards.

    Args:
        summaries: of the shards, in the order they were asked for.
        findings: of all of them together.
        folders: what lay beside them.
    """

    summaries: Sequence[ShardSummary]
    findings: Findings
    folders: Sequence[FolderIndex]

    def total(self, unit: Unit) -> int:
        """What the shares of findings are shares of."""
        if unit == "shards":
            return len(self.summaries)
        return len(self.folders) if unit == "folders" else sum(getattr(each, f"num_{unit}") for each in self.summaries)

    def num_unusable(self) -> int:
        """Records that would be left out."""
        return self.total("records") - sum(summary.num_usable for summary in self.summaries)

    def rows(self) -> list[dict[str, Any]]:
        """Findings ready for a table or JSON, the worst first."""
        found = [(name, kind) for name, kind in KINDS.items() if self.findings.counts[name]]
        return [
            {
                "finding": name,
                "severity": kind.severity,
                "count": self.findings.counts[name],
                "of": self.total(kind.unit),
                "unit": kind.unit,
                "meaning": kind.meaning,
                "fix": kind.fix,
                "examples": self.findings.examples[name],
            }
            for name, kind in sorted(found, key=lambda item: SEVERITIES.index(item[1].severity))
        ]

    def to_json(self) -> dict[str, Any]:
        """The whole inspection for other programs."""
        return {
            "format": 1,
            "num_shards": self.total("shards"),
            "num_records": self.total("records"),
            "num_unusable": self.num_unusable(),
            "num_captions": self.total("captions"),
            "num_questions": self.total("questions"),
            "num_image_bytes": sum(summary.num_bytes for summary in self.summaries),
            "findings": self.rows(),
            "histograms": {
                name: {source: dict(sorted(counts.items())) for source, counts in by_source.items()}
                for name, by_source in merged_histograms(self.summaries).items()
            },
        }


def inspect_shards(
    urls: Sequence[str],
    settings: CheckSettings,
    *,
    limit: int | None = None,
    workers: int = 1,
    count_tokens: CountTokens | None = None,
    cache: ShardCache | None = None,
    index: str | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Look at every record of some shards.

    Args:
        urls: the shards.
        settings: what to look at.
        limit: stop after this many records, counted in the order of the shards; such a check runs in one process.
        workers: processes at most; little data is looked at in this one.
        count_tokens: judges captions by tokens too; picklable where there are several processes.
        cache: reaches remote shards and holds copies of them.
        index: path or url of an index that does not lie beside the shards.
        progress: called after every shard.

    Raises:
        DataError: an index that is not ours, or a process was killed.
    """
    cache = cache or ShardCache()
    folder_of = {url: url if url.startswith("pipe:") else beside(url, "") for url in urls}
    by_folder: dict[str, list[str]] = {}
    for url, folder in folder_of.items():
        by_folder.setdefault(folder, []).append(url)
    # the output of a command has nothing beside it
    folders = {
        name: read_folder(inside, cache.remote, index)
        for name, inside in by_folder.items()
        if not name.startswith("pipe:")
    }
    shards = [
        folders[folder_of[url]].shard(url) if folder_of[url] in folders else Shard(url, UNCOUNTED) for url in urls
    ]
    expected = sum(shard.num_records for shard in shards) if all(s.num_records != UNCOUNTED for s in shards) else None
    expected = limit if expected is None else min(expected, limit or expected)
    inspect = partial(inspect_shard, settings=settings, count_tokens=count_tokens, cache=cache)
    found: dict[int, ShardSummary] = {}
    done = num_bytes = 0
    useful = -(-(expected or _RECORDS_PER_WORKER * len(urls)) // _RECORDS_PER_WORKER)
    for place, summary in _summaries(shards, inspect, limit, min(workers, len(urls), useful)):
        found[place] = summary
        done, num_bytes = done + summary.num_records, num_bytes + summary.num_bytes
        if progress is not None:
            progress(done, expected, num_bytes)
    summaries = [found[place] for place in sorted(found)]
    findings = Findings()
    for summary in summaries:
        findings.merge(summary.findings)
    for folder, beside_it in folders.items():
        compare(beside_it, [summary for summary in summaries if folder_of[summary.url] == folder], findings)
    find_duplicates(summaries, [folder_of[summary.url] for summary in summaries], findings, cache)
    return Inspection(summaries, findings, list(folders.values()))


def _summaries(
    shards: Sequence[Shard], inspect: Callable[..., ShardSummary], limit: int | None, workers: int
) -> Iterator[tuple[int, ShardSummary]]:
    """(place in `shards`, summary) of each shard, in any order."""
    if workers > 1 and limit is None:
        yield from _in_pool(shards, inspect, workers)
        return
    for place, shard in enumerate(shards):
        if limit is not None and limit <= 0:
            return
        summary = inspect(shard, limit=limit)
        if limit is not None:
            limit -= summary.num_records
        yield place, summary


def _in_pool(
    shards: Sequence[Shard], inspect: Callable[..., ShardSummary], workers: int
) -> Iterator[tuple[int, ShardSummary]]:
    others = {*multiprocessing.active_children()}
    with worker_pool(
        worker_context(__name__), workers, "repeat the command with fewer workers=", _start_worker
    ) as pool:
        try:
            yield from run_tasks(pool, inspect, shards, workers)
        except BaseException:  # left early: what the processes read is of no use, and they write nothing
            for process in {*multiprocessing.active_children()} - others:
                process.terminate()
            raise


def _start_worker() -> None:
    torch.set_num_threads(1)
    end_with_parent()
