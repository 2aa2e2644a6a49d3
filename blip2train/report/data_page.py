"""Shards -> one HTML page that shows what is in them: pictures with captions, histograms, findings.

Implements `blip2train data view`: the look at the data that comes before a day of training on it. The page needs no
other file and no network; everything people wrote is shown as text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip2train.data.inspect_shard import ShardSummary, merged_histograms
from blip2train.data.inspection import Inspection
from blip2train.report.curve import NUM_COLORS
from blip2train.report.data_card import Card
from blip2train.report.histogram import Histogram, draw_histogram, group_sources, quantile
from blip2train.report.page import render_template
from blip2train.run_dir import write_text

_QUANTITIES = (
    ("caption_words", "Caption length", "words", 1.0),
    ("captions_per_image", "Captions per image", "captions", 1.0),
    ("questions_per_image", "Questions per image", "questions", 1.0),
    ("width", "Image width", "pixels", 1.0),
    ("height", "Image height", "pixels", 1.0),
    ("aspect", "Width / height", "", 0.01),
    ("kilobytes", "File size", "kB", 1.0),
)


def write_data_page(
    out: Path,
    title: str,
    inspection: Inspection,
    cards: Sequence[Card],
    *,
    num_shards: int,
    num_records: int,
    seed: int,
) -> Path:
    """Write the page and return its path.

    Args:
        out: the file; its folder is created.
        title: headline.
        inspection: of the shards, or of some of them.
        cards: the gallery.
        num_shards, num_records: there are in all.
        seed: the cards were drawn with.
    """
    histograms = merged_histograms(inspection.summaries)
    sources = _sources(inspection.summaries)
    largest = sorted(sources, key=lambda row: -row["records"])[: NUM_COLORS - (len(sources) > NUM_COLORS)]
    colored = {
        name: group_sources(by_source, [row["name"] for row in largest]) for name, by_source in histograms.items()
    }
    drawn: list[Histogram | None] = [
        draw_histogram(name, colored[key], unit, scale)
        for key, name, unit, scale in _QUANTITIES
        if key != "questions_per_image" or inspection.total("questions")
    ]
    html = render_template(
        "data_page.html.j2",
        filters={"bytes": format_bytes},
        title=title,
        made=time.strftime("%d %B %Y, %H:%M"),
        num_shards=num_shards,
        num_records=num_records,
        inspected=len(inspection.summaries),
        total={unit: inspection.total(unit) for unit in ("records", "captions", "questions")},
        num_unusable=inspection.num_unusable(),
        num_bytes=sum(summary.num_bytes for summary in inspection.summaries),
        sources=sources,
        colors=list(colored["width"]),
        facts=[(index.name, _facts(index.facts)) for index in inspection.folders],
        findings=inspection.rows(),
        histograms=[histogram for histogram in drawn if histogram is not None],
        cards=cards,
        card_sources=list(dict.fromkeys(card.source for card in cards)),
        seed=seed,
    )
    write_text(out, html, errors="backslashreplace")
    return out


def format_bytes(number: float) -> str:
    """Bytes in the largest unit of a thousand that leaves at least one."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def _sources(summaries: Sequence[ShardSummary]) -> list[dict[str, Any]]:
    """One row per source, in the order of their first shard."""
    rows: dict[str, dict[str, Any]] = {}
    histograms = merged_histograms(summaries)
    for summary in summaries:
        row = rows.setdefault(summary.source, {"name": summary.source, "shards": 0, "bytes": 0, "unusable": 0})
        row["shards"] += 1
        row["bytes"] += summary.num_bytes
        row["unusable"] += summary.num_records - summary.num_usable
        for name in ("records", "captions", "questions"):
            row[name] = row.get(name, 0) + getattr(summary, f"num_{name}")
    for name, row in rows.items():
        words = histograms["caption_words"][name]
        row["words"] = quantile(words, 0.5) if words else 0
    return list(rows.values())


def _facts(manifest: Any) -> list[tuple[str, str]]:
    """The manifest's numbers and texts, nested ones with their path."""
    lines: list[tuple[str, str]] = []
    for key, value in manifest.items():
        name = key.replace("_", " ")
        if isinstance(value, dict):
            lines += [(f"{name}: {inner}", text) for inner, text in _facts(value)]
        elif isinstance(value, str | int | float):
            lines.append((name, str(value)))
    return lines
