"""`blip2train data index`: shards of img2dataset or anyone else -> the index.json that training reads."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from blip2train.cli.config import require_filled
from blip2train.cli.progress import show_progress
from blip2train.errors import ConfigError

if TYPE_CHECKING:
    from blip2train.data.index_shards import ScannedShard

_SHOWN = 20


def run(config: DictConfig) -> None:
    """Write the index; leaves with code 1 when a shard is damaged or unreadable."""
    require_filled(config)
    from blip2train.data.index_shards import index_shards
    from blip2train.data.shards import ShardCache, expand_urls

    if config.workers is not None and config.workers < 1:
        raise ConfigError(f"workers={config.workers}", where="workers", fix="give 1 or more, or null for every core")
    options: Any = OmegaConf.to_container(config.storage_options)
    cache = ShardCache(**OmegaConf.to_container(config.cache), storage_options=options)  # type: ignore[arg-type]
    urls = expand_urls(config.urls if isinstance(config.urls, str) else list(config.urls), cache)
    with show_progress("indexing shards") as progress:
        scanned = index_shards(
            urls,
            out=Path(config.out).expanduser() if config.out else None,
            cache=cache,
            workers=config.workers or len(os.sched_getaffinity(0)),
            checksums=config.checksums,
            progress=progress,
        )
    _print(scanned)
    if any(shard.damage for shard in scanned):
        raise SystemExit(1)


def _print(scanned: list[ScannedShard]) -> None:
    entries = [shard.entry for shard in scanned if shard.entry is not None]
    damaged = [shard for shard in scanned if shard.damage is not None]
    table = Table(title="index", show_header=False)
    table.add_row("shards", f"{len(entries):,}")
    table.add_row("records", f"{sum(entry.num_records for entry in entries):,}")
    table.add_row("bytes", f"{sum(entry.num_bytes for entry in entries):,}")
    table.add_row("unreadable, in no index", f"{len(scanned) - len(entries):,}")
    table.add_row("damaged", f"{sum(shard.entry is not None for shard in damaged):,}")
    Console().print(table)
    for shard in damaged[:_SHOWN]:
        sys.stdout.write(f"{shard.url}: {shard.damage}\n")
    if len(damaged) > _SHOWN:
        sys.stdout.write(f"and {len(damaged) - _SHOWN} more\n")
