"""`blip2train data pack`: a data set as it was downloaded -> shards with an index and a manifest."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blip2train.cli.config import config_dir, require_filled
from blip2train.cli.pack_source import open_source
from blip2train.cli.progress import show_progress

_PLAIN = r"[\w ./*+-]+"
"""What Hydra reads without quotes, letters of English alone among it."""


def run(config: DictConfig) -> None:
    """Pack; a call that was interrupted goes on after its whole shards, and a finished one only shows its table."""
    require_filled(config)
    from blip2train.data.pack import pack
    from blip2train.data.pack_worker import PackSettings

    settings = PackSettings(**OmegaConf.to_container(config.shards))  # type: ignore[arg-type]
    source = open_source(config)
    with show_progress("packing") as progress:
        manifest = pack(
            source,
            Path(config.out).expanduser(),
            settings,
            workers=len(os.sched_getaffinity(0)) if config.workers is None else config.workers,
            max_skipped_share=config.max_skipped_share,
            progress=progress,
        )
    _print_manifest(config.out, manifest)


def _print_manifest(out: str, manifest: dict[str, Any]) -> None:
    table = Table(title=escape(out), show_header=False)
    numbers = {name: value for name, value in manifest.items() if name.startswith("num_") and name != "num_bytes"}
    rows = [(name.removeprefix("num_"), f"{value:,}") for name, value in numbers.items()]
    rows.append(("shards", f"{len(manifest['shards']):,}, {manifest['num_bytes'] / 1e6:,.1f} MB"))
    rows.append(("formats", ", ".join(f"{count:,} {name}" for name, count in manifest["formats"].items())))
    made = manifest["made"]
    rows.append(("made in", f"{made['seconds']:,.1f} s, workers={made['workers']}"))
    for cause, count in manifest["skipped"].items():
        names = manifest["skipped_examples"][cause]
        shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
        rows.append((f"skipped: {cause}", f"{count:,}  ({shown})"))
    rows += [(name, str(value)) for name, value in manifest["notes"].items()]
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    Console().print(table)
    sys.stdout.write(_next_commands(out))


def _next_commands(out: str) -> str:
    """What to do with the shards: look for defects, and add them to a training under their folder's name."""
    path = f"{Path(out)}/*.tar"
    urls = f"'urls=[{path}]'" if re.fullmatch(_PLAIN, path, re.ASCII) else f"""'urls=["{path}"]'"""
    name = re.sub(r"\W", "_", Path(out).resolve().name, flags=re.ASCII)
    name = f"data_{name}" if re.match("[0-9]", name) else name
    known = (config_dir() / "data" / "dataset" / f"{name}.yaml").is_file() and name != "folder"
    add = f"+data/dataset@data.datasets.{name}={name if known else 'folder'}"
    add += "" if known else f" data.datasets.{name}.name={name}"
    return f"""check:  blip2train data check {urls}
train:  blip2train train experiment=... {add} 'data.datasets.{name}.{urls[1:]}
"""
