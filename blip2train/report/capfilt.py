"""A folder that CapFilt has filled -> report.html in it, one file that needs no other.

Before anybody trains on new captions, somebody should look at them: distributions, and images with all texts.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blip2train.benchmark.thumbnail import thumbnail
from blip2train.data.image_transform import decode_image
from blip2train.data.shards import IMAGE_EXTENSIONS, MANIFEST_NAME, read_shard
from blip2train.errors import DataError
from blip2train.report.outline import draw_outlines
from blip2train.report.page import render_template
from blip2train.run_dir import read_json, write_text

_ORIGINS = ("web", "synthetic")
_ABOUT = {
    "best": ("Highest scores", "What the ranker is surest of."),
    "worst": ("Lowest scores", "Where the image and all its texts are furthest apart: look for wrong captions here."),
    "random": ("Nobody's choice", "Taken by the hash of the key."),
}

Groups = Mapping[str, Iterable[tuple[int, int]]]
"""Group name ("web kept", ...) -> rows of (bin, count), as report.json has them."""


def write_page(folder: Path) -> Path:
    """Write `folder`/report.html from its manifest.json, report.json and shards; returns its path."""
    manifest, report = read_json(folder / MANIFEST_NAME), read_json(folder / "report.json")
    html = render_template(
        "capfilt.html.j2",
        filters={},
        title=f"CapFilt: {folder.absolute().name}",
        manifest=manifest,
        counts=Counter(report["statistics"]["counts"]),
        summary=report["summary"],
        drawings=_drawings(report["statistics"]),
        galleries=[(*_ABOUT[kind], rows) for kind, rows in report["examples"].items() if rows],
        pictures=_read_pictures(folder, [row for rows in report["examples"].values() for row in rows]),
    )
    page = folder / "report.html"
    write_text(page, html, errors="replace")
    return page


def _drawings(statistics: Mapping[str, Any]) -> list[tuple[str, str, list[tuple[str, int]], str]]:
    """(title, how to read it, (group, size) in the order of colours, SVG)."""
    scores, words, width = statistics["scores"], statistics["words"], 1 / statistics["bins_per_unit"]
    kept = {name: words.get(f"{name} kept", []) for name in _ORIGINS}
    panels = [
        ("Web and synthetic", "Similarity of every candidate to its image, by who wrote it.",
         {name: _sum_of(scores, name) for name in _ORIGINS}, width, "cosine similarity"),
        ("Kept and dropped", "The filter at work: the further apart, the more there was to choose from.",
         {name: _sum_of(scores, name) for name in ("kept", "dropped")}, width, "cosine similarity"),
        ("Length of kept captions", "Web captions are often names and lists, synthetic ones short sentences.",
         {name: Counter(dict(rows)) for name, rows in kept.items()}, 1.0, "words"),
        ("Place of the best web caption", "Among the candidates of its image, from 0, the best.",
         {"images": Counter(dict(statistics["ranks"]))}, 1.0, "place"),
    ]  # fmt: skip
    return [
        (title, reading, [(name, found.total()) for name, found in groups.items()], draw_outlines(groups, unit, axis))
        for title, reading, groups, unit, axis in panels
        if any(found.total() for found in groups.values())
    ]


def _sum_of(groups: Groups, word: str) -> Counter[int]:
    """The sum of the groups whose name holds `word`."""
    total: Counter[int] = Counter()
    for name, rows in groups.items():
        if word in name.split():
            total.update(dict(rows))
    return total


def _read_pictures(folder: Path, rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Small pictures of the examples as data URIs, by key."""
    wanted: dict[str, set[str]] = {}
    for row in rows:
        wanted.setdefault(row["shard"], set()).add(row["key"])
    found: dict[str, str] = {}
    for shard, keys in wanted.items():
        for record in read_shard(str(folder / shard)):
            if record["__key__"] in keys:
                data = next((record[kind] for kind in IMAGE_EXTENSIONS if kind in record), b"")
                try:
                    small = thumbnail(decode_image(data))
                except DataError:  # changed since; the page says "no picture"
                    continue
                found[record["__key__"]] = "data:image/jpeg;base64," + base64.b64encode(small).decode()
    return found
