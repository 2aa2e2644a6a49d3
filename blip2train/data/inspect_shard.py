"""One shard -> its findings, histograms and hashes: what a worker process of a check sends back.

Implements the shard part of `blip2train data check` and `data view`. Kept of a record are 24 bytes and 8 for each
caption, whatever its size, so that a hundred million records can be compared with each other.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blip2train.data.caption import clean_caption
from blip2train.data.finding import Findings
from blip2train.data.inspect_record import CheckSettings, RecordFacts, caption_hash, hash8, inspect_record
from blip2train.data.shard_index import UNCOUNTED
from blip2train.data.shards import RawRecord, Shard, ShardCache, ShardReader
from blip2train.errors import DataError

CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""Texts -> the number of tokens of each, special ones included."""

HISTOGRAMS = ("caption_words", "captions_per_image", "questions_per_image", "width", "height", "aspect", "kilobytes")
"""Whole numbers, except `aspect`: width / height in hundredths. `kilobytes` is rounded up."""


@dataclass
class ShardSummary:
    """What one shard holds.

    Args:
        url: as given.
        source: folder and prefix, the name of the group it is counted in.
        findings: of this shard on its own.
        num_records: found, and promised but lost.
        num_usable: of them without a reason to leave them out.
        num_captions, num_questions, num_bytes: in all; bytes are of the encoded images.
        size: of the tar in bytes; None where it is remote.
        sha256: of the tar, where it was asked for.
        complete: read to its end, with nothing cut off.
        keys, images: uint64 (records,), hashes; 0 where there is none.
        image_ids: int64 (records,).
        captions: uint64 (captions,), hashes after cleaning, in the order of the records.
        captions_of: uint16 (records,), how many of `captions` belong to each.
        histograms: by name, value -> how often.
    """

    url: str
    source: str
    findings: Findings = field(default_factory=Findings)
    num_records: int = 0
    num_usable: int = 0
    num_captions: int = 0
    num_questions: int = 0
    num_bytes: int = 0
    size: int | None = None
    sha256: str | None = None
    complete: bool = True
    keys: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    images: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    image_ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    captions: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    captions_of: NDArray[np.uint16] = field(default_factory=lambda: np.zeros(0, np.uint16))
    histograms: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in HISTOGRAMS})


def inspect_shard(
    shard: Shard,
    settings: CheckSettings,
    limit: int | None = None,
    count_tokens: CountTokens | None = None,
    cache: ShardCache | None = None,
) -> ShardSummary:
    """Read one shard and look at every record.

    Args:
        shard: the shard; what it promises is judged, where it is counted.
        settings: what to look at.
        limit: stop after this many records.
        count_tokens: judges captions by tokens too.
        cache: holds copies of remote shards.
    """
    summary = ShardSummary(shard.url, source_of(shard.url))
    hashes = _Hashes()
    # as uncounted: the reader need not warn of what is found and counted here
    reader = ShardReader([replace(shard, num_records=UNCOUNTED)], cache, max_open=1)
    try:
        num_found = reader.num_found(0)
        for index in range(num_found if limit is None else min(limit, num_found)):
            record = reader.record(0, index)
            facts = inspect_record(record, settings)
            hashes.add(record, facts)
            _count(record, facts, summary)
            if count_tokens is not None:
                _count_tokens(record, facts, summary, settings, count_tokens)
        summary.complete = limit is None or num_found < limit
        if summary.complete:
            _judge_end(summary, shard.num_records, num_found, reader.damage(0))
    except DataError as error:  # a remote shard, after all retries
        summary.findings.add("unreachable_shard", f"{shard.url}: {error.found}")
        summary.complete = False
    finally:
        reader.close()
    hashes.store(summary)
    path = Path(shard.url)
    if path.is_file():
        summary.size = path.stat().st_size
        if settings.checksums and summary.complete:
            with path.open("rb") as file:
                summary.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return summary


def _judge_end(summary: ShardSummary, promised: int, num_found: int, damage: str | None) -> None:
    """Count the records that are lost behind the last one found, and say what is wrong with the tar as a whole."""
    lost = max(promised - num_found, 0) if damage is not None else 0
    unreadable = summary.findings.counts["unreadable_shard"] > 0
    if unreadable or (damage is not None and not num_found):
        lost = lost or int(not unreadable)
        summary.findings.add("unreadable_shard", f"{summary.url}: {damage}", count=lost)
    elif lost:
        example = f"{summary.url}: {num_found} of {promised} records found: {damage}"
        summary.findings.add("truncated_shard", example, count=lost)
    elif damage is not None and not summary.findings.counts["truncated_shard"]:
        summary.findings.add("damaged_shard", f"{summary.url}: {damage}")
    elif not num_found:
        summary.findings.add("empty_shard", summary.url)
    summary.num_records += lost
    summary.complete = damage is None


def source_of(url: str) -> str:
    """The group of a shard: its folder's name and its own without the number ("coco/train"; "cc3m" of cc3m/00012)."""
    parts = url.split("?")[0].rstrip("/").split("/")
    folder = parts[-2] if len(parts) > 1 else ""
    prefix = re.sub(r"[-_.]?\d*$", "", parts[-1].split(".")[0])
    return "/".join(part for part in (folder, prefix) if part) or url


class _Hashes:
    """Grows while a shard is read; arrays at its end."""

    def __init__(self) -> None:
        self._keys: list[int] = []
        self._images: list[int] = []
        self._image_ids: list[int] = []
        self._captions: list[int] = []
        self._captions_of: list[int] = []

    def add(self, record: RawRecord, facts: RecordFacts) -> None:
        # a record that could not be read has no key of its own
        broken = "__broken__" in record
        self._keys.append(0 if broken else hash8(record["__key__"].encode("utf-8", "surrogatepass")))
        # what training never sees cannot be in anything's way
        self._images.append(facts.image_hash or 0 if facts.usable else 0)
        self._image_ids.append(facts.image_id or 0)
        said = facts.captions[: np.iinfo(np.uint16).max] if facts.usable else ()
        captions = [caption_hash(caption) for caption in said]
        self._captions += captions
        self._captions_of.append(len(captions))

    def store(self, summary: ShardSummary) -> None:
        lost = summary.num_records - len(self._keys)
        for column in (self._keys, self._images, self._image_ids, self._captions_of):
            column += [0] * lost
        summary.keys = np.array(self._keys, np.uint64)
        summary.images = np.array(self._images, np.uint64)
        summary.image_ids = np.array(self._image_ids, np.int64)
        summary.captions = np.array(self._captions, np.uint64)
        summary.captions_of = np.array(self._captions_of, np.uint16)


def _count(record: RawRecord, facts: RecordFacts, summary: ShardSummary) -> None:
    summary.num_records += 1
    summary.num_captions += len(facts.captions)
    summary.num_questions += facts.num_questions
    summary.num_bytes += facts.num_bytes
    place = f"{summary.url} {record['__key__']}"
    for kind, detail in facts.defects:
        summary.findings.add(kind, f"{place}: {detail}")
    for kind, detail in facts.text_defects:
        summary.findings.add(kind, f"{place}: {detail}")
    if not facts.usable:
        return
    summary.num_usable += 1
    histograms = summary.histograms
    histograms["caption_words"].update(len(caption.split()) for caption in facts.captions)
    histograms["captions_per_image"][len(facts.captions)] += 1
    histograms["questions_per_image"][facts.num_questions] += 1
    histograms["kilobytes"][-(-facts.num_bytes // 1000)] += 1
    if facts.size is not None and min(facts.size) > 0:
        width, height = facts.size
        histograms["width"][width] += 1
        histograms["height"][height] += 1
        histograms["aspect"][round(100 * width / height)] += 1


def _count_tokens(
    record: RawRecord, facts: RecordFacts, summary: ShardSummary, settings: CheckSettings, count_tokens: CountTokens
) -> None:
    if not facts.captions:
        return
    cleaned = [clean_caption(caption, settings.max_words) for caption in facts.captions]
    for caption, number in zip(cleaned, count_tokens(cleaned), strict=True):
        if number > settings.max_tokens:
            place = f"{summary.url} {record['__key__']}"
            summary.findings.add("long_caption_tokens", f"{place}: {number} tokens: {caption!r}")


def merged_histograms(summaries: Sequence[ShardSummary]) -> Mapping[str, Mapping[str, Counter[int]]]:
    """Histograms by name and source, sources in the order of their first shard."""
    merged: dict[str, dict[str, Counter[int]]] = {name: {} for name in HISTOGRAMS}
    for summary in summaries:
        for name, histogram in summary.histograms.items():
            merged[name].setdefault(summary.source, Counter()).update(histogram)
    return merged
