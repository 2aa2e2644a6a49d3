"""Urls of shards -> shards with their record counts, from what lies beside them or by counting.

Implements what makes a position in the data arithmetic: with every count known, any sample is found without reading
those before it. LAVIS takes the number of records from the config.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from blip2train.data.remote import beside, is_remote, read_small
from blip2train.data.shard_cache import ShardCache
from blip2train.data.shard_index import (
    INDEX_NAME,
    SIZES_NAME,
    UNCOUNTED,
    Shard,
    parse_index,
    parse_sizes,
    parse_stats,
    stats_name,
)
from blip2train.data.shard_reader import ShardReader, file_name
from blip2train.errors import DataError

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


def count_shards(urls: Sequence[str], cache: ShardCache) -> list[Shard]:
    """One `Shard` per url, in the same order.

    The counts come from our `index.json`, webdataset's `sizes.json` (one file per folder) or img2dataset's
    `NNNNN_stats.json` beside the shard. A local shard without any is counted by a scan of its headers.

    Raises:
        DataError: an index that is none, or remote shards nobody has counted.
    """
    lookup = _Lookup()
    found = [lookup.find(url) for url in urls]
    uncounted = [url for url, shard in zip(urls, found, strict=True) if shard is None]
    remote = [url for url in uncounted if is_remote(url)]
    if remote:
        raise DataError(
            f"{len(remote)} of {len(urls)} remote shards without a record count",
            where=", ".join(remote[:3]),
            fix="count them once: `blip2train data index 'urls=[...]' out=index.json`, and give that file as index=, "
            f"or upload it as {INDEX_NAME} beside them",
        )
    counted = dict(zip(uncounted, _scan(uncounted, cache), strict=True))
    return [counted[url] if shard is None else shard for url, shard in zip(urls, found, strict=True)]


class _Lookup:
    """Reads every index once."""

    def __init__(self) -> None:
        self._indexes: dict[str, dict[str, Shard]] = {}

    def find(self, url: str) -> Shard | None:
        if url.startswith("pipe:"):
            return None
        name = file_name(url)
        row = self._folder(url).get(name)
        if row is not None:
            return Shard(url, row.num_records, row.num_bytes, row.sha256)
        where = beside(url, stats_name(name))
        content = read_small(where)
        return None if content is None else Shard(url, parse_stats(content, where))

    def _folder(self, url: str) -> dict[str, Shard]:
        folder = beside(url, "")
        if folder not in self._indexes:
            shards: dict[str, Shard] = {}
            where = beside(url, SIZES_NAME)
            if (content := read_small(where)) is not None:
                shards |= {name: Shard(name, number) for name, number in parse_sizes(content, where).items()}
            where = beside(url, INDEX_NAME)
            if (content := read_small(where)) is not None:
                rows = parse_index(content, where).values()
                shards |= {
                    row.name: Shard(row.name, row.num_records, row.num_bytes or None, row.sha256 or None)
                    for row in rows
                }
            self._indexes[folder] = shards
        return self._indexes[folder]


def _scan(urls: Sequence[str], cache: ShardCache) -> list[Shard]:
    """Count local shards by their headers; an unreadable one counts as one record, which is drawn and then named."""
    reader = ShardReader([Shard(url, UNCOUNTED) for url in urls], cache, max_open=1)
    start = last_line = time.monotonic()
    shards: list[Shard] = []
    for place, url in enumerate(urls):
        shards.append(Shard(url, reader.num_found(place)))
        now = time.monotonic()
        if now - last_line >= _SECONDS_BETWEEN_LINES:
            last_line = now
            left = (now - start) / len(shards) * (len(urls) - len(shards))
            logger.info("counted %d of %d shards without an index, %.0f s left", len(shards), len(urls), left)
    reader.close()
    if shards:
        logger.info(
            "counted %d records in %d shards without an index in %.1f s (`blip2train data index` writes one): %s",
            *(sum(shard.num_records for shard in shards), len(shards), time.monotonic() - start, urls[0]),
        )
    return shards
