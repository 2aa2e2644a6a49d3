"""Records -> shards that appear under their names only when they are whole.

Implements the writing side of the storage: plain WebDataset tars with `index.json` beside them. LAVIS writes no shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from blip2train.data.shard_index import ShardEntry, write_index
from blip2train.data.tar_shard import TarShard, check_key
from blip2train.errors import ConfigError


class ShardWriter:
    """Writes `<prefix>-000000.tar`, ... and, on leaving the `with` block without an error, `index.json`.

    A shard appears under its name only when it is complete. Times and owners are fixed: equal records give equal bytes.

    Args:
        folder: created if missing.
        prefix: start of every shard's name.
        samples_per_shard: records per tar; the last one may hold fewer.
        finished: entries of shards that an interrupted run left behind; writing goes on after them.
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str = "shard",
        samples_per_shard: int = 1000,
        finished: Sequence[ShardEntry] = (),
    ) -> None:
        if samples_per_shard < 1:
            raise ConfigError(f"samples_per_shard={samples_per_shard}", where="ShardWriter", fix="give 1 or more")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.entries = list(finished)
        self._prefix = prefix
        self._samples_per_shard = samples_per_shard
        self._shard: TarShard | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish_shard()
            write_index(self.folder, self.entries)
        elif self._shard is not None:
            self._shard.abandon()

    def write(self, key: str, image: bytes, extension: str, json: bytes) -> bool:
        """Append one record; returns True when this completed a shard.

        Args:
            key: unique in the data set, and one that `tar_shard.check_key` takes.
            image: encoded image.
            extension: of `image`, without a dot.
            json: the encoded record (see `data/record_field.py` for its fields).
        """
        check_key(key)
        if self._shard is None:
            name = f"{self._prefix}-{len(self.entries):06d}.tar"
            self._shard = TarShard(self.folder / name, self.folder / f".{self._prefix}.partial")
        self._shard.write(key, {extension: image, "json": json})
        if self._shard.num_records == self._samples_per_shard:
            self.finish_shard()
            return True
        return False

    def finish_shard(self) -> None:
        """Complete the shard being written, if it holds a record."""
        if self._shard is not None:
            self.entries.append(self._shard.finish())
            self._shard = None
