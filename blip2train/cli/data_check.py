"""`blip2train data check`: shards -> what is in them, and what training would drop."""

from __future__ import annotations

from collections import Counter

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from blip2train.cli.config import require_filled
from blip2train.cli.progress import show_progress
from blip2train.errors import DataError


def run(config: DictConfig) -> None:
    """Read every record of some shards as training would and count what is in them and what would be dropped."""
    require_filled(config)
    from blip2train.data.drop import DropLedger
    from blip2train.data.sample import read_eval_items
    from blip2train.data.shards import expand_urls

    urls = expand_urls(config.urls if isinstance(config.urls, str) else list(config.urls))
    dropped = DropLedger(["check"], max_dropped_share=1.0)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    with show_progress("checking") as progress:
        for item in read_eval_items(
            urls, lambda image, generator: image, config.limit, ledger=dropped, dataset="check"
        ):
            counts["images"] += 1
            counts["captions"] += len(item.captions)
            counts["questions"] += len(item.questions)
            counts["images without caption"] += not item.captions
            sizes[f"{item.image.shape[2]}x{item.image.shape[1]}"] += 1
            progress(counts["images"], None)
    counts.update({f"dropped: {cause}": n for cause, n in dropped.counts()["check"].items() if n and cause != "used"})
    if not counts["images"]:
        raise DataError("no usable record", where=", ".join(urls[:3]), fix="pack the data again")
    table = Table(title=f"{len(urls)} shards", show_header=False)
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    table.add_row("commonest sizes", ", ".join(f"{size} ({count})" for size, count in sizes.most_common(4)))
    Console().print(table)
