"""Hashes of all records -> duplicate keys, images and captions, and image ids in conflict.

Implements the comparison between shards of `blip2train data check`: sorted arrays, 40 bytes per record at the peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2train.data.finding import NUM_EXAMPLES, Findings
from blip2train.data.inspect_shard import ShardSummary
from blip2train.data.shard_index import UNCOUNTED
from blip2train.data.shards import Shard, ShardCache, ShardReader

Places = NDArray[np.int64]
"""Records by number, counted through all shards."""


def find_duplicates(
    summaries: Sequence[ShardSummary],
    folders: Sequence[str],
    findings: Findings,
    cache: ShardCache | None = None,
) -> None:
    """Add what only a comparison of records shows.

    Args:
        summaries: of all shards.
        folders: of each of them; keys and image ids are compared within a folder.
        findings: added to.
        cache: holds copies of remote shards, in which examples are looked up again.
    """
    keys, images, ids = (_joined(summaries, name) for name in ("keys", "images", "image_ids"))
    folder = np.repeat(
        np.unique(np.array(folders, dtype=object).astype(str), return_inverse=True)[1],
        [len(summary.keys) for summary in summaries],
    )
    names = _Names(summaries, cache)
    for number in np.unique(folder):
        inside = np.flatnonzero(folder == number)
        named = inside[keys[inside] != 0]
        later, first = _repeated(keys[named])
        _add(findings, "duplicate_key", named[later], named[first], names, "has the key of")
        seen = inside[images[inside] != 0]
        later, first = _repeated(ids[seen])
        other = images[seen][later] != images[seen][first]
        _add(findings, "image_id_conflict", seen[later][other], seen[first][other], names, "has the image_id of")
    seen = np.flatnonzero(images)
    later, first = _repeated(images[seen])
    same = ids[seen][later] == ids[seen][first]
    for kind, chosen in (("duplicate_image", same), ("duplicate_image_other_id", ~same)):
        _add(findings, kind, seen[later][chosen], seen[first][chosen], names, "has the image of")
    owner = np.repeat(np.arange(len(keys)), _joined(summaries, "captions_of"))
    later, first = _repeated(_joined(summaries, "captions"))
    _add(findings, "duplicate_caption", owner[later], owner[first], names, "has a caption of")
    names.close()


class _Names:
    """Looks up keys of records by number."""

    def __init__(self, summaries: Sequence[ShardSummary], cache: ShardCache | None) -> None:
        self._reader = ShardReader([Shard(summary.url, UNCOUNTED) for summary in summaries], cache, max_open=1)
        self._starts = np.concatenate([[0], np.cumsum([summary.num_records for summary in summaries])])

    def look_up(self, place: int) -> str:
        """`shard key` of a record."""
        shard = int(np.searchsorted(self._starts, place, side="right")) - 1
        record = self._reader.record(shard, place - int(self._starts[shard]))
        return f"{record['__url__']} {record['__key__']}"

    def close(self) -> None:
        self._reader.close()


def _repeated(values: NDArray[Any]) -> tuple[Places, Places]:
    """Indices of values that occurred before, in order, and of the first occurrence of each."""
    order = np.argsort(values, kind="stable")
    starts = np.concatenate([[True], np.diff(values[order]) != 0]) if len(order) else np.zeros(0, bool)
    group_start = np.flatnonzero(starts)
    first = order[group_start[np.cumsum(starts) - 1]] if len(order) else order
    later = np.flatnonzero(~starts)
    by_place = np.argsort(order[later])
    return order[later][by_place], first[later][by_place]


def _add(findings: Findings, kind: str, later: Places, first: Places, names: _Names, what: str) -> None:
    """Count records that repeat something of an earlier one; the first few are named together with it."""
    pairs = zip(later[:NUM_EXAMPLES].tolist(), first[:NUM_EXAMPLES].tolist(), strict=True)
    examples = [f"{names.look_up(own)}: {what} {names.look_up(other)}" for own, other in pairs]
    findings.add(kind, *examples, count=len(later))


def _joined(summaries: Sequence[ShardSummary], name: str) -> NDArray[Any]:
    return np.concatenate([getattr(summary, name) for summary in summaries])
