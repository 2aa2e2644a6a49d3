"""Counts of values -> bars as inline SVG, stacked by source; the page's style sheet gives the colours.

Drawn by hand: a bar needs four numbers, and the page stays small and sharp at any width.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NUM_BARS = 32
OTHER_SOURCES = "all others"
_WIDTH, _HEIGHT, _BOTTOM = 340, 132, 18
_STEPS = (1, 2, 2.5, 5, 10)
_LABELLED_BARS = 8


@dataclass(frozen=True, slots=True)
class Histogram:
    """One drawing: `svg` is inline markup, `summary` its numbers in words."""

    title: str
    svg: str
    summary: str


@dataclass(frozen=True, slots=True)
class Bar:
    """Values `low` up to and without `high`, by source; the last bar of a histogram takes everything above."""

    low: float
    high: float
    counts: tuple[int, ...]


def draw_histogram(
    title: str, by_source: Mapping[str, Counter[int]], unit: str, scale: float = 1.0
) -> Histogram | None:
    """Draw one quantity; None where there is nothing to draw.

    Args:
        title: headline.
        by_source: value -> how often, for each source; see `group_sources`.
        unit: of a value, for the words.
        scale: a value of 1 stands for this many units.
    """
    total = sum(by_source.values(), Counter())
    if not total:
        return None
    summary = describe(total, unit, scale)
    bars = to_bars(by_source, scale)
    return Histogram(title, _to_svg(bars, list(by_source), f"{title}: {summary}", unit, scale), summary)


def describe(counts: Counter[int], unit: str, scale: float = 1.0) -> str:
    """Mean, median, where 90 % lie, and the largest, in words."""
    low, middle, high, largest = (_number(quantile(counts, share) * scale) for share in (0.05, 0.5, 0.95, 1.0))
    if len(counts) == 1:
        return f"always {largest} {unit}".rstrip()
    mean = sum(value * count for value, count in counts.items()) / counts.total()
    return (
        f"mean {_number(mean * scale)} {unit}".rstrip()
        + f", median {middle}, 90 % from {low} to {high}, largest {largest}"
    )


def quantile(counts: Counter[int], share: float) -> int:
    """The smallest value that at least `share` of the counted are not above."""
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= share * counts.total():
            return value
    raise ValueError("no values")


def to_bars(by_source: Mapping[str, Counter[int]], scale: float = 1.0) -> list[Bar]:
    """At most `NUM_BARS` bars of equal, round width up to where 99 % of the values lie; the last takes the rest."""
    total = sum(by_source.values(), Counter())
    low, high = min(total), quantile(total, 0.99)
    width = _round_width((high - low + 1) / NUM_BARS, whole=scale == 1.0)
    first = math.floor(low / width)
    last = max(math.floor(high / width), first)
    counts = [[0] * len(by_source) for _ in range(first, last + 1)]
    for place, source in enumerate(by_source.values()):
        for value, count in source.items():
            counts[min(math.floor(value / width), last) - first][place] += count
    return [Bar((first + i) * width, (first + i + 1) * width, tuple(row)) for i, row in enumerate(counts)]


def group_sources(by_source: Mapping[str, Counter[int]], named: Sequence[str]) -> dict[str, Counter[int]]:
    """The named sources in their order, and all others as one behind them, so that every drawing has equal colours."""
    rest = sum((counts for name, counts in by_source.items() if name not in named), Counter[int]())
    others = {OTHER_SOURCES: rest} if len(named) < len(by_source) else {}
    return {name: by_source.get(name, Counter()) for name in named} | others


def _round_width(width: float, whole: bool) -> float:
    if width <= 1:
        return 1.0
    size = 10 ** math.floor(math.log10(width))
    step = next(step for step in _STEPS if step * size >= width and not (whole and step * size % 1))
    return float(step * size)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def _to_svg(bars: Sequence[Bar], sources: Sequence[str], description: str, unit: str, scale: float) -> str:
    tallest = max(sum(bar.counts) for bar in bars)
    step = _WIDTH / len(bars)
    width = min(step * 0.86, 28)
    room = _HEIGHT - _BOTTOM - 4
    shapes = []
    for place, bar in enumerate(bars):
        left, bottom = place * step + (step - width) / 2, float(_HEIGHT - _BOTTOM)
        parts = []
        for source, count in enumerate(bar.counts):
            height = room * count / tallest
            bottom -= height
            if count:
                parts.append(
                    f'<rect x="{left:.1f}" y="{bottom:.2f}" width="{width:.1f}" height="{max(height, 0.7):.2f}" '
                    f'fill="var(--series-{source})"/>'
                )
        if parts:
            shapes.append(
                f"<g><title>{html.escape(_label(bar, bars, unit, scale, sources))}</title>{''.join(parts)}</g>"
            )
    beyond = f"largest {_number(bars[-1].low * scale)}" not in description
    places = range(len(bars)) if len(bars) <= _LABELLED_BARS else sorted({0, len(bars) // 2, len(bars) - 1})
    for place in places:
        ends = len(bars) > _LABELLED_BARS and place in (0, len(bars) - 1)
        anchor = ("start" if place == 0 else "end") if ends else "middle"
        x = {"start": 0.0, "middle": (place + 0.5) * step, "end": float(_WIDTH)}[anchor]
        text = _number(bars[place].low * scale) + ("+" if beyond and place == len(bars) - 1 else "")
        shapes.append(f'<text x="{x:.1f}" y="{_HEIGHT - 4}" text-anchor="{anchor}">{text}</text>')
    line = f'<line x1="0" x2="{_WIDTH}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM}"/>'
    label = html.escape(description)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(shapes)}{line}</svg>'


def _label(bar: Bar, bars: Sequence[Bar], unit: str, scale: float, sources: Sequence[str]) -> str:
    single = bar.high - bar.low == 1 and scale == 1.0
    upper = "" if single else f" up to {_number(bar.high * scale)}"
    if bar is bars[-1]:
        upper = " and more"
    counted = [f"{count:,} of {source}" for source, count in zip(sources, bar.counts, strict=True) if count]
    text = f"{sum(bar.counts):,}" if len(sources) == 1 else ", ".join(counted)
    return f"{_number(bar.low * scale)}{upper} {unit}: {text}"
