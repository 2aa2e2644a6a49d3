"""`blip2train data pack|check`: your images and captions -> shards; shards -> what is in them."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from blip2train.cli.config import require_filled, run_subverb
from blip2train.cli.evaluate import show_progress
from blip2train.errors import ConfigError, DataError

log = logging.getLogger(__name__)

USAGE = """usage: blip2train data pack input=FOLDER out=SHARDS [captions=FILE.jsonl]
       blip2train data pack source=coco input=IMAGES captions=captions_train2017.json out=SHARDS
       blip2train data check 'urls=[SHARDS/*.tar]'

`data pack --help` and `data check --help` list every setting."""


def main() -> None:
    verbs = {"pack": ("data_pack", pack), "check": ("data_check", check)}
    run_subverb(USAGE, verbs)


def pack(config: DictConfig) -> None:
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


def check(config: DictConfig) -> None:
    """Read every record of some shards as training would and count what is in them and what would be dropped."""
    require_filled(config)
    from blip2train.data.sample import DropCounter, read_eval_items
    from blip2train.data.shards import expand_urls

    urls = expand_urls(config.urls if isinstance(config.urls, str) else list(config.urls))
    dropped = DropCounter("check", max_dropped_share=1.0)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    with show_progress("checking") as progress:
        for item in read_eval_items(urls, lambda image, generator: image, config.limit, counter=dropped):
            counts["images"] += 1
            counts["captions"] += len(item.captions)
            counts["questions"] += len(item.questions)
            counts["images without caption"] += not item.captions
            sizes[f"{item.image.shape[2]}x{item.image.shape[1]}"] += 1
            progress(counts["images"], None)
    counts.update({f"dropped: {cause}": n for cause, n in dropped.as_dict().items() if n and cause != "used"})
    if not counts["images"]:
        raise DataError("no usable record", where=", ".join(urls[:3]), fix="pack the data again")
    table = Table(title=f"{len(urls)} shards", show_header=False)
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    table.add_row("commonest sizes", ", ".join(f"{size} ({count})" for size, count in sizes.most_common(4)))
    Console().print(table)


if __name__ == "__main__":
    main()
