"""Distributions of several groups -> inline SVG, outlines over each other; the page's style sheet gives the colours.

Each is drawn as a share of its own group, so that groups of very different size can be compared: CapFilt has ten
synthetic captions for one of the web.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

_WIDTH, _HEIGHT = 460, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 12, 30
_MAX_BINS = 60


def draw_outlines(groups: Mapping[str, Mapping[int, int]], bin_width: float, axis: str) -> str:
    """Draw one outline per group over a common axis.

    Args:
        groups: name -> histogram by bin number; the n-th group has the page's colour n. Empty groups are left out.
        bin_width: of the axis; bin n goes from n to n + 1 times this.
        axis: its label.
    """
    places = [place for histogram in groups.values() for place, count in histogram.items() if count]
    if not places:
        return ""
    step = max(1, -(-(max(places) + 1 - min(places)) // _MAX_BINS))
    first, last = min(places) // step, max(places) // step + 1
    shares = [(index, name, _shares(histogram, step)) for index, (name, histogram) in enumerate(groups.items())]
    highest = max(max(found.values()) for _, _, found in shares if found)
    plot_width, plot_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(place: float) -> float:
        return _LEFT + plot_width * (place - first) / (last - first)

    def y(share: float) -> float:
        return _TOP + plot_height * (1 - share / highest)

    parts = [_grid(highest, y), _ticks(first * step * bin_width, last * step * bin_width, step * bin_width, x)]
    for index, name, found in shares:
        if found:
            points = [(x(first), y(0.0))]
            for place in range(first, last):
                level = y(found.get(place, 0.0))
                points += [(x(place), level), (x(place + 1), level)]
            points.append((x(last), y(0.0)))
            path = " ".join(f"{left:.1f},{top:.1f}" for left, top in points)
            fill = f'fill="var(--series-{index})" stroke="var(--series-{index})"'
            parts.append(f'<polygon class="area" {fill} points="{path}"><title>{html.escape(name)}</title></polygon>')
    label = f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 2}" text-anchor="end">{html.escape(axis)}</text>'
    description = f"{axis}: " + ", ".join(f"{name} {sum(groups[name].values())}" for _, name, found in shares if found)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(description)}">'
        f"{''.join(parts)}{label}</svg>"
    )


def tick_step(span: float, wanted: int = 6) -> float:
    """The round distance (1, 2 or 5 times a power of ten) that gives about `wanted` ticks."""
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _shares(histogram: Mapping[int, int], step: int) -> dict[int, float]:
    total = sum(histogram.values())
    found: dict[int, float] = {}
    for place, count in histogram.items():
        found[place // step] = found.get(place // step, 0.0) + count / total
    return found


def _grid(highest: float, y: Callable[[float], float]) -> str:
    step = tick_step(highest, 4)
    levels = [step * number for number in range(1, int(highest / step) + 1)]
    return "".join(
        f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>'
        f'<text x="{_LEFT - 5}" y="{y(level) + 4:.1f}" text-anchor="end">{100 * level:.4g} %</text>'
        for level in levels
    )


def _ticks(start: float, end: float, unit: float, x: Callable[[float], float]) -> str:
    step = max(tick_step(end - start), unit)
    numbers: Sequence[int] = range(math.ceil(start / step - 1e-9), math.floor(end / step + 1e-9) + 1)
    base = _HEIGHT - _BOTTOM
    axis = f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>'
    return axis + "".join(
        f'<text x="{x(number * step / unit):.1f}" y="{base + 14}" text-anchor="middle">{number * step:.4g}</text>'
        for number in numbers
    )
