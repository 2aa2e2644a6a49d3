"""Check "shards": the urls of every dataset expand, some of the shards are read as training reads them, and how fast.

All local shards by their size, and a sample of records: `blip2train data check` looks at every record of all.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from blip2train.cli import check
from blip2train.cli.config import build
from blip2train.cli.doctor.context import Context
from blip2train.cli.doctor.row import Row, of_error
from blip2train.data.drop import DROP_CAUSES
from blip2train.data.finding import KINDS, Findings
from blip2train.data.inspect_index import FolderIndex, compare, read_folder
from blip2train.data.inspect_record import CheckSettings
from blip2train.data.inspect_shard import inspect_shard
from blip2train.data.remote import beside, is_remote
from blip2train.data.shard_index import UNCOUNTED
from blip2train.data.shards import Shard, ShardCache, ShardReader, expand_urls
from blip2train.data.sharing import Shape
from blip2train.data.stream import PartStream
from blip2train.errors import Blip2TrainError

CHECK = "shards"
RECORDS_PER_SHARD = 16
SECONDS_OF_READING = 4.0
REMOTE_AT_MOST = 2
"""Remote shards that are fetched, whole, per dataset."""
_ERRORS_SHOWN = 3
_OF_RECORDS = {*DROP_CAUSES} - {"truncated_shard", "unreadable_shard"}
"""What training leaves out record by record; a tar that is cut off is a copy to be made again."""
_IMPATIENT = {"attempts": 2, "timeout_s": 20.0}
"""A store that does not answer now will not answer training, either."""


@dataclasses.dataclass
class Sample:
    """What was found in some shards of a dataset.

    Args:
        urls: of all its shards.
        opened: of those that were looked into.
        indexed: the records of all shards are known without counting.
        records: looked at.
        findings: in the names and sizes of all, and in those records.
    """

    urls: Sequence[str]
    opened: Sequence[str]
    indexed: bool
    records: int
    findings: Findings


def check_shards(context: Context) -> Iterator[Row]:
    """One row per dataset, and one of the loader's speed."""
    config = context.to_build
    if not config.data.datasets:
        fix = "choose an experiment=, or +data/dataset@data.datasets.NAME=NAME"
        yield Row(CHECK, "fail", "no dataset in the config", fix)
        return
    failed = False
    for name, dataset in config.data.datasets.items():
        context.say(f"reading shards of {name}")
        try:
            row = judge_sample(look_at_dataset(dataset, config, context.shards), float(config.data.max_dropped_share))
        except Blip2TrainError as error:
            row = of_error(CHECK, error)
        failed = failed or row.status == "fail"
        yield dataclasses.replace(row, measured=f"{name}: {row.measured}")
    if failed or any(is_remote(url) for dataset in config.data.datasets.values() for url in _listed(dataset.urls)):
        return  # the order of training would fetch remote shards from everywhere
    context.say("reading samples as training does")
    rate = context.facts.loader_samples_per_s = read_rate(config)
    workers = int(config.data.num_workers)
    yield Row(CHECK, "ok", f"a loader process reads, decodes and collates {rate:,.0f} samples/s; {workers} per device")


def look_at_dataset(dataset: DictConfig, config: DictConfig, number: int) -> Sample:
    """Expand a dataset's urls, compare them with what lies beside them, and look into some.

    Args:
        dataset: as in the config.
        config: gives the limits on images, and the cache.
        number: shards to open; the first and the last are among them.

    Raises:
        ConfigError, DataError: urls that are none, missing shards, or an index that is none.
    """
    plain: Any = OmegaConf.to_container(dataset, resolve=True)
    settings: Any = OmegaConf.to_container(config.data.cache, resolve=True)
    cache: ShardCache = build(settings | _IMPATIENT).with_options(plain.get("storage_options") or {})
    urls = expand_urls(plain["urls"], cache)
    folders = _folders(urls, cache, plain.get("index"))
    findings = Findings()
    for folder in folders.values():
        compare(folder, [], findings)
    _compare_sizes(urls, folders, findings)
    # the records of a feature cache hold tokens and no image to decode
    level = CheckSettings("fast" if config.get("features") else "full", max_pixels=int(config.data.max_pixels))
    opened = choose_shards(urls, min(number, REMOTE_AT_MOST) if any(map(is_remote, urls)) else number)
    records = 0
    for url in opened:
        summary = inspect_shard(_shard(url, folders), level, limit=RECORDS_PER_SHARD, cache=cache)
        records += summary.num_records
        findings.merge(summary.findings)
        _look_at_end(url, summary.findings, findings, cache)
    indexed = all(_shard(url, folders).num_records != UNCOUNTED for url in urls)
    return Sample(urls, opened, indexed, records, findings)


def judge_sample(sample: Sample, max_dropped_share: float) -> Row:
    """What was found in a sample of shards.

    Args:
        sample: of one dataset.
        max_dropped_share: of its records that training leaves out before it stops.
    """
    found = sample.findings.counts
    kinds = [kind for kind in found if KINDS[kind].severity == "error"]
    measured = f"{len(sample.urls):,} shards, {sample.records} records of {len(sample.opened)} looked at"
    if not sample.records and not kinds:
        return Row(CHECK, "fail", f"{measured}: no record in them", "pack the data again")
    if kinds:
        said = "; ".join(f"{found[kind]} {kind}: {sample.findings.examples[kind][0]}" for kind in kinds[:_ERRORS_SHOWN])
        lost = sum(found[kind] for kind in kinds)
        tolerated = {*kinds} <= _OF_RECORDS and lost <= max_dropped_share * sample.records
        fix = "blip2train data check names all, with a repair for each"
        return Row(CHECK, "warn" if tolerated else "fail", f"{measured}; {said}", fix)
    if not sample.indexed:
        fix = "blip2train data index counts them once; else every start reads the headers of all shards"
        return Row(CHECK, "warn", f"{measured}; no index says how many records they have", fix)
    return Row(CHECK, "ok", f"{measured}; all are in their index")


def choose_shards(urls: Sequence[str], number: int) -> list[str]:
    """The first, the last, and others between them, the same at every call; in their order."""
    if len(urls) <= number:
        return list(urls)
    ends = {0, len(urls) - 1} if number > 1 else {0}
    between = random.Random(0).sample(range(1, len(urls) - 1), number - len(ends))
    return [urls[place] for place in sorted({*ends, *between})]


def read_rate(config: DictConfig) -> float:
    """Samples per second of one process through the real pipeline: order, decoding, augmentation, tokens, collation."""
    settings = copy.deepcopy(config.data)
    settings.drop_log = None
    datamodule = build(settings)
    size = max(1, min(16, check.device_batch(config)))
    # as one rank with one worker, whatever this launch is: the sample is of speed, not of order
    parts = iter(PartStream(datamodule.mixture, datamodule.collator, Shape(0, 1, 1, size), 0))
    next(parts)  # opens shards
    start, done, seconds = time.perf_counter(), 0, 0.0
    while seconds < SECONDS_OF_READING:
        next(parts)
        done += size
        seconds = time.perf_counter() - start
    return done / seconds


def _listed(urls: Any) -> list[str]:
    return [urls] if isinstance(urls, str) else [str(url) for url in urls]


def _folders(urls: Sequence[str], cache: ShardCache, index: str | None) -> dict[str, FolderIndex]:
    """What lies beside the shards, by folder; a command has nothing beside it."""
    inside: dict[str, list[str]] = {}
    for url in urls:
        if not url.startswith("pipe:"):
            inside.setdefault(beside(url, ""), []).append(url)
    return {name: read_folder(found, cache.remote, index) for name, found in inside.items()}


def _shard(url: str, folders: dict[str, FolderIndex]) -> Shard:
    """A shard with what its index promises."""
    folder = None if url.startswith("pipe:") else folders.get(beside(url, ""))
    return Shard(url, UNCOUNTED) if folder is None else folder.shard(url)


def _compare_sizes(urls: Sequence[str], folders: dict[str, FolderIndex], findings: Findings) -> None:
    """Every local shard against the bytes that its index has of it: a copy that broke off shows."""
    for shard in (_shard(url, folders) for url in urls if not is_remote(url)):
        size = Path(shard.url).stat().st_size
        if shard.num_bytes not in (None, size):
            findings.add("changed_shard", f"{shard.url}: {size} bytes, the index says {shard.num_bytes}")


def _look_at_end(url: str, known: Findings, findings: Findings, cache: ShardCache) -> None:
    """A tar that is cut off behind the records that were looked at."""
    if known.counts["unreadable_shard"] or known.counts["truncated_shard"] or known.counts["unreachable_shard"]:
        return
    reader = ShardReader([Shard(url, UNCOUNTED)], cache, max_open=1)
    try:
        damage = reader.damage(0)
    finally:
        reader.close()
    if damage is not None and not known.counts["damaged_shard"]:
        findings.add("truncated_shard", f"{url}: {damage}")
