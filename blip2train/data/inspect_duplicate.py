"""Hashes of all records -> duplicate keys, images and captions, and image ids in conflict.

Implements the comparison between shards of `blip2train data check`: sorted arrays, 40 bytes per record at the peak.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2train.data.finding import NUM_EXAMPLES, Findings
from blip2train.data.inspect_shard import ShardSummary
from blip2train.data.shards import read_shard

Places = NDArray[np.int64]
"""Records by number, counted through all shards."""


def find_duplicates(
    summaries: Sequence[ShardSummary],
    folders: Sequence[str],
    findings: Findings,
    read: Callable[[str], Any] = read_shard,
) -> None:
    """Add what only a comparison of records shows.

    Args:
        summaries: of all shards.
        folders: of each of them; keys and image ids are compared within a folder.
        findings: added to.
        read: yields the records of a url; examples are looked up in the shards again.
    """
    keys, images, ids = (_joined(summaries, name) for name in ("keys", "images", "image_ids"))
    folder = np.repeat(
        np.unique(np.array(folders, dtype=object).astype(str), return_inverse=True)[1],
        [len(summary.keys) for summary in summaries],
    )
    names = _Names(summaries, read)
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


class _Names:
    """Looks up keys of records by number; each shard is read once, as far as needed."""

    def __init__(self, summaries: Sequence[ShardSummary], read: Callable[[str], Any]) -> None:
        self._summaries, self._read = summaries, read
        self._starts = np.concatenate([[0], np.cumsum([summary.num_records for summary in summaries])])
        self._known: dict[int, str] = {}

    def look_up(self, places: Sequence[int]) -> list[str]:
        """`shard key` of each record."""
        wanted: dict[int, set[int]] = defaultdict(set)
        for place in places:
            if place not in self._known:
                wanted[int(np.searchsorted(self._starts, place, side="right")) - 1].add(place)
        for shard, inside in wanted.items():
            start, url = int(self._starts[shard]), self._summaries[shard].url
            for place, record in enumerate(islice(self._read(url), max(inside) - start + 1), start=start):
                if place in inside:
                    self._known[place] = f"{url} {record['__key__']}"
        return [self._known[place] for place in places]


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
    shown = [place for pair in zip(later[:NUM_EXAMPLES], first[:NUM_EXAMPLES], strict=True) for place in pair]
    found = names.look_up([int(place) for place in shown])
    pairs = zip(found[::2], found[1::2], strict=True)
    findings.add(kind, *(f"{own}: {what} {other}" for own, other in pairs), count=len(later))


def _joined(summaries: Sequence[ShardSummary], name: str) -> NDArray[Any]:
    return np.concatenate([getattr(summary, name) for summary in summaries])
