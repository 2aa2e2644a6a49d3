"""The door to shards: which there are, and how many records each holds. What reads and writes them lies in `shard_*`.

Implements the storage of the data path: plain WebDataset tars, so that img2dataset, open_clip and Energon read ours
and we theirs. Beside our own shards lies `index.json` (records, bytes and sha256 per shard), which makes any sample a
matter of arithmetic. LAVIS reads shards with webdataset's resampling pipeline: its order cannot be repeated or resumed.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

import webdataset as wds

from blip2train.data.remote import is_remote
from blip2train.data.shard_cache import ShardCache
from blip2train.data.shard_copy import GZIP_ENDINGS
from blip2train.data.shard_count import count_shards
from blip2train.data.shard_index import INDEX_NAME, MANIFEST_NAME, Shard, ShardEntry, write_index
from blip2train.data.shard_reader import RawRecord, ShardReader, read_shard
from blip2train.data.shard_writer import ShardWriter
from blip2train.errors import ConfigError, DataError

__all__ = [
    "IMAGE_EXTENSIONS",
    "INDEX_NAME",
    "MANIFEST_NAME",
    "RawRecord",
    "Shard",
    "ShardCache",
    "ShardEntry",
    "ShardReader",
    "ShardWriter",
    "expand_urls",
    "open_shards",
    "read_shard",
    "write_index",
]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif")

_ENDINGS = (".tar", *GZIP_ENDINGS)


def expand_urls(urls: str | Sequence[str], cache: ShardCache | None = None) -> list[str]:
    """Expand braces, globs and folders to a list of shards in a fixed order.

    Remote urls are expanded, too: braces everywhere, `*` and a folder's name with a `/` at its end where the store can
    be listed (s3, gs, a web server that shows its folders). Whether a remote shard exists shows when it is read.

    Args:
        urls: paths, urls, patterns of them, and folders.
        cache: reaches remote stores.

    Raises:
        ConfigError: no url at all.
        DataError: local shards that do not exist, by name; a remote pattern that matches nothing.
    """
    patterns = [urls] if isinstance(urls, str) else list(urls)
    if not patterns:
        raise ConfigError("an empty list of shards", where="urls", fix="give at least one path, glob or url of a .tar")
    expanded: list[str] = []
    missing: list[str] = []
    for pattern in patterns:
        for url in _braces(pattern):
            found = _list(url, cache or ShardCache()) if is_remote(url) else _find(url)
            expanded += found
            if not found:
                missing.append(url)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise DataError(
            f"{len(missing)} of the shards do not exist: {shown}",
            where=f"urls={', '.join(patterns)} (working folder {Path.cwd()})",
            fix="check the path, or make shards with `blip2train data pack`",
        )
    return expanded


def open_shards(urls: str | Sequence[str], cache: ShardCache | None = None, index: str | None = None) -> list[Shard]:
    """Expand `urls` and find out how many records each shard holds, see `shard_count.count_shards`.

    Args:
        urls: see `expand_urls`.
        cache: reaches remote stores.
        index: path or url of an index that does not lie beside the shards.

    Raises:
        ConfigError: no url at all.
        DataError: shards that do not exist, an index that is none, or remote shards nobody has counted.
    """
    cache = cache or ShardCache()
    return count_shards(expand_urls(urls, cache), cache, index)


def _braces(pattern: str) -> list[str]:
    local = pattern.removeprefix("file://")
    expanded: list[str] = wds.shardlists.expand_urls(pattern if is_remote(local) else str(Path(local).expanduser()))
    return expanded


def _list(url: str, cache: ShardCache) -> list[str]:
    if url.startswith("pipe:") or not ("*" in url or url.endswith("/")):
        return [url]
    if not url.endswith("/"):
        return cache.remote.list(url)
    return [found for found in cache.remote.list(f"{url}*") if found.endswith(_ENDINGS)]


def _find(url: str) -> list[str]:
    path = Path(url)
    if path.is_dir():
        return sorted(str(found) for found in path.iterdir() if found.name.endswith(_ENDINGS))
    if path.is_file():
        return [url]
    return sorted(glob.glob(url))  # noqa: PTH207 (a pattern may be absolute)
