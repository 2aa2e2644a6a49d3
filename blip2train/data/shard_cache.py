"""Shard url -> open file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from blip2train.data.remote import is_remote
from blip2train.data.shard_index import Shard
from blip2train.errors import DataError


class ShardCache:
    """Local shards pass through."""

    def open(self, shard: Shard) -> BinaryIO:
        if is_remote(shard.url):
            raise DataError("a remote shard", where=shard.url, fix="copy it to a local folder")
        return Path(shard.url).open("rb")

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Local shards are there."""
