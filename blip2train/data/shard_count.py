"""Urls of shards -> shards with their record counts, from what lies beside them or by counting.

Implements what makes a position in the data arithmetic: with every count known, any sample is found without reading
those before it. LAVIS takes the number of records from the config.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from blip2train.data.remote import Remote, beside, is_remote
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
_REQUESTS_AT_ONCE = 16


def count_shards(urls: Sequence[str], cache: ShardCache, index: str | None = None) -> list[Shard]:
    """One `Shard` per url, in the same order.

    The counts come from `index`, or, beside each shard, from our `index.json`, webdataset's `sizes.json` (one file per
    folder) or img2dataset's `NNNNN_stats.json`. A local shard without any is counted by a scan of its headers.

    Args:
        urls: of single shards.
        cache: reaches remote ones.
        index: path or url of an `index.json` that lies elsewhere; its names are whole urls or file names.

    Raises:
        DataError: an index that is none or missing, or remote shards nobody has counted.
    """
    known = _from_index(urls, index, cache.remote) if index else {}
    known |= _from_beside([url for url in urls if url not in known and not url.startswith("pipe:")], cache.remote)
    uncounted = [url for url in urls if url not in known]
    remote = [url for url in uncounted if is_remote(url)]
    if remote:
        raise DataError(
            f"{len(remote)} of {len(urls)} remote shards without a record count",
            where=", ".join(remote[:3]),
            fix="count them once: `blip2train data index 'urls=[...]' out=index.json`, and give that file as the "
            f"dataset's index=, or upload it as {INDEX_NAME} beside them",
        )
    known |= {shard.url: shard for shard in _scan(uncounted, cache)}
    return [known[url] for url in urls]


def read_stats(urls: Sequence[str], remote: Remote) -> dict[str, int]:
    """By url, the record counts that img2dataset wrote beside its shards; without those that have none.

    Raises:
        DataError: what lies there is no such count, or cannot be reached.
    """
    places = [beside(url, stats_name(file_name(url))) for url in urls]
    # a store answers in some 0.1 s, and a data set may have 100,000 shards
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        contents = list(pool.map(remote.read, places))
    return {
        url: parse_stats(content, place)
        for url, place, content in zip(urls, places, contents, strict=True)
        if content is not None
    }


def _from_index(urls: Sequence[str], index: str, remote: Remote) -> dict[str, Shard]:
    content = remote.read(index)
    if content is None:
        raise DataError("an index that does not exist", where=f"index={index}", fix="check the path")
    rows = _shards(content, index)
    found = {url: rows.get(url) or rows.get(file_name(url)) for url in urls}
    meant = Counter(row.url for row in found.values() if row is not None)
    for url, row in found.items():
        if row is not None and meant[row.url] > 1 and row.url != url:
            raise DataError(
                f"{meant[row.url]} shards have the file name {row.url}, which the index counts once",
                where=f"index={index}",
                fix="write it again with `blip2train data index`, which names shards of several folders by whole urls",
            )
    return {url: replace(row, url=url) for url, row in found.items() if row is not None}


def _from_beside(urls: Sequence[str], remote: Remote) -> dict[str, Shard]:
    folders = {beside(url, INDEX_NAME): url for url in urls}
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        counted = dict(zip(folders, pool.map(lambda url: _read_folder(url, remote), folders.values()), strict=True))
    rows = {url: counted[beside(url, INDEX_NAME)].get(file_name(url)) for url in urls}
    found = {url: replace(row, url=url) for url, row in rows.items() if row is not None}
    others = read_stats([url for url in urls if url not in found], remote)
    return found | {url: Shard(url, count) for url, count in others.items()}


def _read_folder(url: str, remote: Remote) -> dict[str, Shard]:
    """By file name, what the index and the sizes beside a shard say."""
    shards: dict[str, Shard] = {}
    sizes, index = beside(url, SIZES_NAME), beside(url, INDEX_NAME)
    if (content := remote.read(sizes)) is not None:
        shards |= {name: Shard(name, number) for name, number in parse_sizes(content, sizes).items()}
    if (content := remote.read(index)) is not None:
        shards |= _shards(content, index)
    return shards


def _shards(content: bytes, where: str) -> dict[str, Shard]:
    rows = parse_index(content, where).values()
    return {row.name: Shard(row.name, row.num_records, row.num_bytes or None, row.sha256 or None) for row in rows}


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
