"""`blip2train data pack`: images with captions -> shards with an index and a manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from blip2train.cli.config import require_filled
from blip2train.cli.progress import show_progress
from blip2train.errors import ConfigError


def run(config: DictConfig) -> None:
    """Images with captions -> shards with an index and a manifest; continues where an interrupted call stopped."""
    require_filled(config)
    from blip2train.data.pack import pack_coco, pack_folder

    sources = {"folder": pack_folder, "coco": pack_coco}
    if config.source not in sources:
        raise ConfigError(f"unknown source {config.source!r}", where="source", fix=f"one of {', '.join(sources)}")
    captions = config.captions or Path(config.input) / "captions.jsonl"
    with show_progress("packing") as progress:
        manifest = sources[config.source](config.input, captions, config.out, progress=progress, **dict(config.shards))
    _print_manifest(config.out, manifest)


def _print_manifest(out: str, manifest: dict[str, Any]) -> None:
    table = Table(title=f"{out}", show_header=False)
    for name, value in manifest.items():
        if not isinstance(value, list | dict):
            table.add_row(name, str(value))
    for cause, count in manifest.get("skipped", {}).items():
        names = manifest.get("skipped_examples", {}).get(cause, [])
        table.add_row(f"skipped: {cause}", f"{count}  ({', '.join(names)})")
    Console().print(table)
