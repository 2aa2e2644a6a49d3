"""`blip2train data check`: shards -> a table of findings, a JSON report and an exit code."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blip2train.cli.config import require_filled
from blip2train.cli.progress import show_progress
from blip2train.errors import ConfigError, DataError
from blip2train.run_dir import check_writable, write_json

if TYPE_CHECKING:
    from blip2train.data.inspection import Inspection

log = logging.getLogger(__name__)

_COLORS = {"error": "red", "warning": "yellow", "note": "dim"}
_EXAMPLES_SHOWN = 3
_LIMITS = ("max_words", "max_tokens", "min_side", "max_aspect", "max_pixels")


def run(config: DictConfig) -> None:
    """Look at every record of some shards; leaves with code 1 when errors were found."""
    require_filled(config)
    if config.json:
        check_writable(Path(config.json), f"json={config.json}")
    inspection = inspect(config)
    if not inspection.total("records") and not inspection.findings.counts["unreadable_shard"]:
        raise DataError("no record", where=f"urls={config.urls}", fix="pack the data again")
    errors = errors_of(inspection, config.strict, config.max_unusable_share)
    print_findings(inspection)
    if config.json:
        path = Path(config.json)
        write_json(path, inspection.to_json() | {"errors": errors})
        log.info("findings: %s", path)
    if errors:
        raise SystemExit(1)


def inspect(config: DictConfig) -> Inspection:
    """The inspection that a config of `data check` asks for."""
    from blip2train.data.inspect_record import CheckSettings
    from blip2train.data.inspection import inspect_shards
    from blip2train.data.shards import ShardCache, expand_urls

    if config.level not in {"fast", "full"}:
        raise ConfigError(f"level {config.level!r}", where="level", fix="full (decode every image) or fast")
    if config.workers is not None and config.workers < 1:
        raise ConfigError(f"workers={config.workers}", where="workers", fix="give 1 or more, or null for every core")
    limits = {name: config[name] for name in _LIMITS}
    settings = CheckSettings(config.level, checksums=config.level == "full", **limits)
    cache = ShardCache(storage_options=dict(config.storage_options))
    urls = expand_urls(config.urls if isinstance(config.urls, str) else list(config.urls), cache)
    count_tokens = None
    if config.tokenizer:
        from blip2train.data.tokenizer import QFormerTokenizer

        count_tokens = QFormerTokenizer.load(config.tokenizer).lengths
    with show_progress("checking") as progress:
        return inspect_shards(
            urls,
            settings,
            limit=config.limit,
            workers=config.workers or os.cpu_count() or 1,
            count_tokens=count_tokens,
            cache=cache,
            index=config.index,
            progress=progress,
        )


def errors_of(inspection: Inspection, strict: bool, max_unusable_share: float) -> list[str]:
    """The findings that make a check fail.

    Args:
        inspection: of the shards.
        strict: warnings fail it, too.
        max_unusable_share: records that training leaves out fail it only above this share.
    """
    from blip2train.data.drop import DROP_CAUSES

    tolerated = inspection.num_unusable() <= max_unusable_share * inspection.total("records")
    return [
        row["finding"]
        for row in inspection.rows()
        if (row["severity"] == "error" and not (tolerated and row["finding"] in DROP_CAUSES))
        or (strict and row["severity"] == "warning")
    ]


def print_findings(inspection: Inspection) -> None:
    """What was read, and a table of findings with the first places of each."""
    console = Console()
    content = inspection.to_json()
    console.print(
        f"{content['num_shards']:,} shards, {content['num_records']:,} records "
        f"({content['num_unusable']:,} unusable), {content['num_captions']:,} captions, "
        f"{content['num_questions']:,} questions, {content['num_image_bytes'] / 1e6:,.1f} MB of images",
        highlight=False,
    )
    rows = inspection.rows()
    if not rows:
        console.print("nothing found")
        return
    table = Table("severity", "finding", "count", "of")
    for row in rows:
        share = f"{row['of']:,} {row['unit']}" + (f" ({_percent(row['count'] / row['of'])} %)" if row["of"] else "")
        severity = f"[{_COLORS[row['severity']]}]{row['severity']}[/]"
        table.add_row(severity, row["finding"], f"{row['count']:,}", share)
    console.print(table)
    for row in rows:
        console.print(f"[bold]{row['finding']}[/]: {row['meaning']}", highlight=False)
        console.print(f"  fix: {row['fix']}", highlight=False)
        for example in row["examples"][:_EXAMPLES_SHOWN]:
            console.print(escape(f"  {example}"), highlight=False, soft_wrap=True)


def _percent(share: float) -> str:
    """Two digits, and no exponent for what is large."""
    return f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.2g}"
