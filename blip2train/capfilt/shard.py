"""One input shard -> one output shard with the captions that CapFilt keeps, and an account of every record.

Implements CapFilt of the paper (section 3.4) from the first to the last byte of a shard. A batch is `batch_size` usable
records of one shard in file order, so that its composition depends on nothing but the shard.

An output record has the key, the image bytes and every other file of the input record, and its JSON with

    captions           the kept texts, best first; training draws one per step
    caption_scores     their similarities, rounded to 5 places
    caption_origins    "web" or "synthetic"
    caption_candidates all of them with score, origin and kept, where `store_all` asks for it
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from blip2train.capfilt.candidate import Candidate, KeepRule, gather_candidates, rank_candidates
from blip2train.capfilt.captioner import Captioner
from blip2train.capfilt.example import Examples
from blip2train.capfilt.item import Item, read_item
from blip2train.capfilt.ranker import Ranker
from blip2train.capfilt.setting import check_types
from blip2train.capfilt.statistics import Statistics
from blip2train.data.drop import Drop
from blip2train.data.shards import RawRecord, Shard, ShardCache, ShardEntry, read_shard
from blip2train.data.tar_shard import TarShard
from blip2train.errors import ConfigError, DataError

_DECODERS = 4


@dataclass(frozen=True, slots=True)
class ShardSettings:
    """What is done with a shard's records, apart from the two models.

    Args:
        rule: which candidates are kept.
        store_all: write every candidate beside the kept ones.
        batch_size: images per call of a model.
        keep_unusable: pass records that cannot be read through as they are, and those of which no caption is kept
            without captions, instead of leaving them out; they are counted in both cases.
    """

    rule: KeepRule = field(default_factory=KeepRule)
    store_all: bool = False
    batch_size: int = 32
    keep_unusable: bool = False

    def __post_init__(self) -> None:
        check_types(self, "")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}", where="batch_size", fix="give 1 or more")


@dataclass
class ShardResult:
    """The account of one shard; becomes its marker.

    Args:
        entry: row of the index; None where no record was left to write.
        num_read: records in the input shard.
        drops: records that cannot be used.
        statistics: of the others.
        examples: the best, the worst and some between.
    """

    entry: ShardEntry | None
    num_read: int
    drops: list[Drop]
    statistics: Statistics
    examples: Examples

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "entry": None if self.entry is None else asdict(self.entry),
            "num_read": self.num_read,
            "drops": [asdict(drop) for drop in self.drops],
            "statistics": self.statistics.as_dict(),
            "examples": self.examples.as_dict(),
        }


def process_shard(
    shard: Shard,
    out: Path,
    captioner: Captioner,
    ranker: Ranker,
    settings: ShardSettings,
    progress: Callable[[int], None] = lambda num_read: None,
    cache: ShardCache | None = None,
) -> ShardResult:
    """Caption, rank and write one shard; `out` appears when it is whole.

    Args:
        shard: the input.
        out: path of the output shard; its folder is made.
        captioner: writes candidates.
        ranker: scores them.
        settings: see `ShardSettings`.
        progress: called with the number of records read so far.
        cache: holds copies of remote shards.

    Raises:
        DataError: the shard does not exist or cannot be fetched, or holds CapFilt's output already.
    """
    result = ShardResult(None, 0, [], Statistics(), Examples())
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with TarShard(out, partial) as file, ThreadPoolExecutor(_DECODERS) as pool:
        for window in _windows(read_shard(shard, cache), settings.batch_size, pool):
            _process_window(window, file, captioner, ranker, settings, result)
            progress(result.num_read)
        if file.num_records:
            result.entry = file.finish()
        else:
            out.unlink(missing_ok=True)  # an empty tar is no shard, and an older one is none of this call's
    return result


def _windows(
    records: Iterator[RawRecord], size: int, pool: ThreadPoolExecutor
) -> Iterator[list[tuple[RawRecord, Item | Drop]]]:
    """Records with their decoded items, `size` at a time; the next ones are decoded while these are worked on."""

    def submit() -> list[Any]:
        return [(record, pool.submit(read_item, record)) for record in islice(records, size)]

    ahead = submit()
    while ahead:
        current, ahead = ahead, submit()
        yield [(record, future.result()) for record, future in current]


def _process_window(
    window: Sequence[tuple[RawRecord, Item | Drop]],
    file: TarShard,
    captioner: Captioner,
    ranker: Ranker,
    settings: ShardSettings,
    result: ShardResult,
) -> None:
    items = [item for _, item in window if isinstance(item, Item)]
    _refuse_output(items, window[0][0]["__url__"])
    ranked = iter(_ranked(items, captioner, ranker, settings.rule, result.statistics.counts))
    for record, item in window:
        result.num_read += 1
        if isinstance(item, Drop):
            result.drops.append(item)
            if settings.keep_unusable and "__broken__" not in record:
                _append(record, file)
            continue
        candidates = next(ranked)
        result.statistics.add(candidates)
        if not any(candidate.kept for candidate in candidates) and not settings.keep_unusable:
            continue  # counted as an image without caption
        _append(_output(record, candidates, settings.store_all), file)
        result.examples.add(item.key, candidates)


def _ranked(
    items: Sequence[Item], captioner: Captioner, ranker: Ranker, rule: KeepRule, counts: Counter[str]
) -> list[list[Candidate]]:
    """Candidates of every item in falling order of score."""
    if not items:
        return []
    images = [item.image for item in items]
    candidates = []
    for item, synthetic in zip(items, captioner(images, [item.key for item in items]), strict=True):
        found, left_out = gather_candidates(item.captions, synthetic, rule.min_words)
        counts.update(
            texts=len(item.captions) + item.num_refused + len(synthetic), texts_left_out_unusable=item.num_refused
        )
        counts.update({f"texts_left_out_{cause}": number for cause, number in left_out.items()})
        candidates.append(found)
    ranking = ranker(images, [[candidate.text for candidate in found] for found in candidates])
    counts.update(texts_truncated_by_ranker=ranking.num_truncated)
    return [rank_candidates(found, scores, rule) for found, scores in zip(candidates, ranking.scores, strict=True)]


def _output(record: RawRecord, candidates: Sequence[Candidate], store_all: bool) -> RawRecord:
    kept = [candidate for candidate in candidates if candidate.kept]
    fields = json.loads(record["json"]) if "json" in record else {}
    fields |= {
        "captions": [candidate.text for candidate in kept],
        "caption_scores": [round(candidate.score, 5) for candidate in kept],
        "caption_origins": [candidate.origin for candidate in kept],
    }
    if store_all:
        fields["caption_candidates"] = [
            asdict(candidate) | {"score": round(candidate.score, 5)} for candidate in candidates
        ]
    # without captions in the JSON, training would read the rejected web caption in the txt
    files = record if kept else {name: data for name, data in record.items() if name != "txt"}
    return files | {"json": json.dumps(fields, ensure_ascii=False).encode()}


def _append(record: RawRecord, file: TarShard) -> None:
    """Write the files of a record; names that start with "__" are notes about it, not files."""
    file.append(record["__key__"], {name: data for name, data in record.items() if not name.startswith("__")})


def _refuse_output(items: Sequence[Item], url: str) -> None:
    """Captions of an earlier call would pass for the web's."""
    for item in items:
        if item.is_output:
            raise DataError(
                "a record that CapFilt has been over already (it has caption_origins)",
                where=f"{url} key {item.key}",
                fix="give the shards as they were before, or leave this step out",
            )
