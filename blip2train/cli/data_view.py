"""`blip2train data view`: shards -> one HTML page with pictures, captions, histograms and findings."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from blip2train.cli.config import require_filled
from blip2train.cli.progress import show_progress
from blip2train.errors import ConfigError, DataError
from blip2train.run_dir import check_writable

if TYPE_CHECKING:
    from blip2train.data.shards import Shard

log = logging.getLogger(__name__)

_NAMES_IN_TITLE = 3


def run(config: DictConfig) -> None:
    """Write the page."""
    require_filled(config)
    if config.num_images < 0:
        raise ConfigError(f"num_images={config.num_images}", where="num_images", fix="give 0 or more")
    check_writable(Path(config.out), f"out={config.out}")
    from blip2train.data.inspect_record import CheckSettings
    from blip2train.data.inspect_shard import source_of
    from blip2train.data.inspection import inspect_shards
    from blip2train.data.shards import ShardCache, open_shards
    from blip2train.report.data_card import sample_cards
    from blip2train.report.data_page import write_data_page

    cache = ShardCache(storage_options=dict(config.storage_options))
    shards = open_shards(config.urls if isinstance(config.urls, str) else list(config.urls), cache, config.index)
    num_records = sum(shard.num_records for shard in shards)
    if not num_records:
        raise DataError("no record", where=f"urls={config.urls}", fix="pack the data again")
    settings = CheckSettings("fast", checksums=False)
    chosen = [shard.url for shard in choose_shards(shards, config.max_records, config.seed)]
    with show_progress("reading") as progress:
        workers = config.workers or os.cpu_count() or 1
        inspection = inspect_shards(
            chosen, settings, workers=workers, cache=cache, index=config.index, progress=progress
        )
    with show_progress("drawing pictures") as progress:
        cards = sample_cards(shards, config.num_images, config.seed, settings, cache=cache, progress=progress)
    sources = list(dict.fromkeys(source_of(shard.url) for shard in shards))
    more = f" and {len(sources) - _NAMES_IN_TITLE} more" if len(sources) > _NAMES_IN_TITLE else ""
    title = config.title or ", ".join(sources[:_NAMES_IN_TITLE]) + more
    page = write_data_page(
        *(Path(config.out), title, inspection, cards),
        num_shards=len(shards),
        num_records=num_records,
        seed=config.seed,
    )
    log.info("%s: %d of %d records (%.1f MB)", page, len(cards), num_records, page.stat().st_size / 1e6)


def choose_shards(shards: Sequence[Shard], max_records: int | None, seed: int) -> list[Shard]:
    """Whole shards, drawn by `seed`, that hold at least `max_records` records; all where there are no more."""
    if max_records is None or sum(shard.num_records for shard in shards) <= max_records:
        return list(shards)
    order = random.Random(seed).sample(range(len(shards)), len(shards))
    chosen, number = [], 0
    for place in order:
        if number >= max_records:
            break
        chosen.append(place)
        number += shards[place].num_records
    return [shards[place] for place in sorted(chosen)]
