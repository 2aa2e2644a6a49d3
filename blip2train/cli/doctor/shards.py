"""Check "shards": the urls of every dataset expand, some of the shards are read as training reads them, and how fast.

A sample of the shards alone: `blip2train data check` looks at every record of all.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from blip2train.cli import check
from blip2train.cli.config import build
from blip2train.cli.doctor.context import Context
from blip2train.cli.doctor.row import Row, of_error
from blip2train.errors import Blip2TrainError

CHECK = "shards"
RECORDS_PER_SHARD = 16
SECONDS_OF_READING = 4.0
REMOTE_AT_MOST = 2
"""Remote shards that are fetched, whole, per dataset."""


def check_shards(context: Context) -> Iterator[Row]:
    """One row per dataset, and one of the loader's speed."""
    config = context.to_build
    rows: list[Row] = []
    for name, dataset in config.data.datasets.items():
        context.say(f"reading shards of {name}")
        try:
            row = look_at_dataset(str(name), dataset, config, context.shards)
        except Blip2TrainError as error:
            found = of_error(CHECK, error)
            row = dataclasses.replace(found, measured=f"{name}: {found.measured}")
        rows.append(row)
        yield row
    if not rows:
        yield Row(
            CHECK, "fail", "no dataset in the config", "choose an experiment=, or +data/dataset@data.datasets.NAME=NAME"
        )
    elif all(row.status != "fail" for row in rows) and not _any_remote(config):
        context.say("reading samples as training does")
        rate = context.facts.loader_samples_per_s = read_rate(config)
        workers = int(config.data.num_workers)
        measured = f"one loader process reads, decodes and collates {rate:,.0f} samples/s; {workers} of them per device"
        yield Row(CHECK, "ok", measured)


def look_at_dataset(name: str, dataset: DictConfig, config: DictConfig, sample: int) -> Row:
    """Expand a dataset's urls and look at records of a sample of its shards.

    Args:
        name, dataset: as in the config.
        config: gives the limits on images and texts.
        sample: shards to open; the first and the last are among them.

    Raises:
        ConfigError, DataError: urls that are none, missing shards, or an index that is none.
    """
    from blip2train.data.drop import DROP_CAUSES
    from blip2train.data.finding import KINDS, Findings
    from blip2train.data.inspect_index import read_folder
    from blip2train.data.inspect_record import CheckSettings
    from blip2train.data.inspect_shard import inspect_shard
    from blip2train.data.remote import beside, is_remote
    from blip2train.data.shards import ShardCache, expand_urls

    plain: Any = OmegaConf.to_container(dataset, resolve=True)
    cache: ShardCache = build(_impatient(config.data.get("cache", None))).with_options(
        plain.get("storage_options") or {}
    )
    urls = expand_urls(plain["urls"], cache)
    folder = read_folder(
        [url for url in urls if beside(url, "") == beside(urls[0], "")], cache.remote, plain.get("index")
    )
    settings = CheckSettings("full", checksums=False, max_pixels=int(config.data.max_pixels))
    if config.get("features"):  # records of a feature cache hold tokens and no image
        settings = dataclasses.replace(settings, level="fast")
    findings, looked_at = Findings(), 0
    chosen = choose_shards(urls, min(sample, REMOTE_AT_MOST) if any(map(is_remote, urls)) else sample)
    for url in chosen:
        summary = inspect_shard(folder.shard(url), settings, limit=RECORDS_PER_SHARD, cache=cache)
        looked_at += summary.num_records
        findings.merge(summary.findings)
        if not summary.num_records:
            findings.add("empty_shard", url)
    errors = [
        f"{count} {kind}: {findings.examples[kind][0]}"
        for kind, count in findings.counts.items()
        if KINDS[kind].severity == "error" or kind == "empty_shard"
    ]
    tolerated = all(kind in DROP_CAUSES for kind in findings.counts if KINDS[kind].severity == "error")
    lost = sum(count for kind, count in findings.counts.items() if kind in DROP_CAUSES)
    tolerated = tolerated and lost <= float(config.data.max_dropped_share) * looked_at
    known = "an index" if folder.index else "no index (its records are counted at the start)"
    measured = f"{name}: {len(urls):,} shards with {known}; {looked_at} records of {len(chosen)} looked at"
    return judge_dataset(measured, errors, tolerated=tolerated, indexed=bool(folder.index))


def _any_remote(config: DictConfig) -> bool:
    """Whether reading samples in their order would fetch shards from everywhere."""
    from blip2train.data.remote import is_remote

    return any(is_remote(str(url)) for dataset in config.data.datasets.values() for url in _listed(dataset.urls))


def _listed(urls: Any) -> list[Any]:
    return [urls] if isinstance(urls, str) else list(urls)


def judge_dataset(measured: str, errors: Sequence[str], *, tolerated: bool, indexed: bool) -> Row:
    """What was found in a sample of shards.

    Args:
        measured: what was looked at.
        errors: found there.
        tolerated: they are records that training leaves out, and no more than the run bears.
        indexed: the records of the shards are known without counting.
    """
    if errors:
        said = f"{measured}; {'; '.join(errors[:3])}"
        return Row(
            CHECK, "warn" if tolerated else "fail", said, "blip2train data check names all, with a repair for each"
        )
    if not indexed:
        return Row(
            CHECK, "warn", measured, "blip2train data index: every start reads the headers of all shards otherwise"
        )
    return Row(CHECK, "ok", measured)


def choose_shards(urls: Sequence[str], number: int) -> list[str]:
    """The first, the last, and others between them, the same at every call; in their order."""
    if len(urls) <= number:
        return list(urls)
    ends = {0, len(urls) - 1} if number > 1 else {0}
    between = random.Random(0).sample(range(1, len(urls) - 1), number - len(ends))
    return [urls[place] for place in sorted({*ends, *between})]


def _impatient(cache: DictConfig | None) -> Any:
    """The config's cache; a store that does not answer is not asked again and again."""
    settings: Any = {"_target_": "blip2train.data.shards.ShardCache"}
    if cache is not None:
        settings = OmegaConf.to_container(cache, resolve=True)
    return settings | {"attempts": 2, "timeout_s": 20.0}


def read_rate(config: DictConfig) -> float:
    """Samples per second of one process through the real pipeline: order, decoding, augmentation, tokens, collation."""
    from blip2train.data.sharing import Shape
    from blip2train.data.stream import PartStream

    settings = copy.deepcopy(config.data)
    settings.drop_log = None
    datamodule = build(settings)
    size = max(1, min(16, check.device_batch(config)))
    # as one rank with one worker, whatever this launch is: the sample is of speed, not of order
    parts = iter(PartStream(datamodule.mixture, datamodule.collator, Shape(0, 1, 1, size), 0))
    next(parts)  # opens shards
    start, done = time.perf_counter(), 0
    for _ in itertools.count():
        next(parts)
        done += size
        seconds = time.perf_counter() - start
        if seconds > SECONDS_OF_READING:
            break
    return done / seconds
