"""metrics.jsonl -> learning curves as inline SVG, each with the level of a model that has learned nothing.

Without that level a loss curve cannot be read: a matching loss of 0.64 looks like progress and is exactly chance.
Colours are left to the page's style sheet, so that the same drawing works light, dark and on paper.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from blip2train.report.collect import Run

MAX_POINTS = 300
NUM_COLORS = 6
# stand-ins that the drawing library can handle; the page's variables take their place
_INK, _RULE, _LABEL = "#0f0f01", "#0f0f02", "#0f0f03"
_SERIES = tuple(f"#0f0f1{index}" for index in range(NUM_COLORS))
# the label's outline in the colour of the card keeps it readable where it crosses a line
_OUTLINED = "var(--muted); paint-order: stroke; stroke: var(--card); stroke-width: 3px"
_VARIABLES = {_INK: "var(--muted)", _RULE: "var(--rule)", _LABEL: _OUTLINED} | {
    color: f"var(--series-{index})" for index, color in enumerate(_SERIES)
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One drawing: `svg` is inline markup, `reading` one sentence on how to read it."""

    title: str
    svg: str
    reading: str


_PANELS = (
    (
        "train/itc_loss",
        "Contrastive loss",
        "Picking each image's text out of the batch; a blind pick stays on the dashed line.",
    ),
    (
        "train/itc_i2t_accuracy",
        "Recall@1 in the batch",
        "How often an image finds its own text in the batch; the dashed line is a blind pick.",
    ),
    (
        "train/itm_loss",
        "Matching loss",
        "Telling pairs from hard negatives; on the dashed line the head only knows that one pair in three matches.",
    ),
    (
        "train/itm_accuracy",
        "Matching accuracy",
        'Always saying "no match" reaches the dashed line, so only what lies above it is skill.',
    ),
    (
        "train/itg_loss",
        "Grounded generation loss",
        "Writing the caption word by word from the image; the dashed line is a guess over the whole vocabulary.",
    ),
    (
        "train/lm_loss",
        "Language-model loss",
        "The frozen language model's surprise at the caption after the visual prompt: lower, the prompt says more.",
    ),
    (
        "gradient_norm",
        "Gradient norm before clipping",
        "Spikes are batches that pull hard, or a learning rate that is too high; clipping cuts them.",
    ),
    (
        "learning_rate",
        "Learning rate",
        "The highest of all parameter groups, as the schedule had it.",
    ),
    (
        "samples_per_second",
        "Throughput, samples per second",
        "Flat is healthy; dips are data waits, checkpoints or a busy machine.",
    ),
    (
        "data_wait_fraction",
        "Waiting for data, share of time",
        "Of the slowest device; far above 0, the loader is what limits the training.",
    ),
    (
        "mfu",
        "Model FLOPs utilization",
        "The model's own operations as a share of what the device could do at most.",
    ),
)


def draw_curves(runs: Sequence[Run]) -> list[Curve]:
    """One drawing per quantity that any run has logged at least twice, all runs in it."""
    curves = []
    for key, title, reading in _PANELS:
        drawn = [(index, run) for index, run in enumerate(runs) if len(run.curve(key)[0]) > 1]
        if drawn:
            curves.append(Curve(title, _draw(key, title, drawn), reading))
    return curves


def _draw(key: str, title: str, runs: Sequence[tuple[int, Run]]) -> str:
    figure = Figure(figsize=(3.5, 2.15), layout="constrained", facecolor="none")
    axes = figure.add_subplot()
    _style(axes)
    largest = 0.0
    for index, run in runs:
        steps, values = _thin(*run.curve(key))
        axes.plot(steps, values, color=_SERIES[index % NUM_COLORS], linewidth=1.8, solid_capstyle="round")
        largest = max(largest, _top(values))
    chance = _chance(key, [run for _, run in runs])
    if chance is not None:
        axes.axhline(chance, color=_INK, linewidth=1.0, linestyle=(0, (4, 3)))
        place: dict[str, Any] = {
            "xycoords": axes.get_yaxis_transform(),
            "textcoords": "offset points",
            "ha": "right",
            "va": "bottom",
        }
        axes.annotate(f"chance {chance:.3g}", (1.0, chance), (0, 2), color=_LABEL, fontsize=9, **place)
        largest = max(largest, chance)
    bottom, _ = axes.get_ylim()
    axes.set_ylim(bottom if key == "train/itm_accuracy" else 0.0, 1.12 * largest or 1.0)
    return _to_svg(figure, key, _describe(title, key, [run for _, run in runs], chance))


def _top(values: Sequence[float]) -> float:
    """What has to fit in: everything, but for single points far above all others, which would flatten the rest."""
    usual = sorted(values)[int(0.98 * (len(values) - 1))]
    return max(values) if max(values) <= 2.0 * usual else usual


def _style(axes: Axes) -> None:
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    axes.set_xlabel("optimizer steps", color=_INK, fontsize=9)
    axes.margins(x=0.01)
    axes.locator_params(nbins=5)


def _chance(key: str, runs: Sequence[Run]) -> float | None:
    levels = [run.manifest.get("chance_levels", {}).get(key) for run in runs]
    known = {float(level) for level in levels if level is not None}
    # runs with different batches or vocabularies have no common level
    return known.pop() if len(known) == 1 else None


def _thin(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Average neighbours so that no curve has more than `MAX_POINTS` points; the last step stays the last."""
    size = -(-len(steps) // MAX_POINTS)
    cuts = range(0, len(steps), size)
    means = [sum(values[cut : cut + size]) / len(values[cut : cut + size]) for cut in cuts]
    return [steps[min(cut + size, len(steps)) - 1] for cut in cuts], means


def _describe(title: str, key: str, runs: Sequence[Run], chance: float | None) -> str:
    parts = []
    for run in runs:
        steps, values = run.curve(key)
        parts.append(f"{run.name} from {values[0]:.3g} to {values[-1]:.3g} at step {steps[-1]:g}")
    against = "" if chance is None else f"; chance is {chance:.3g}"
    return f"{title}: {', '.join(parts)}{against}"


def _to_svg(figure: Figure, key: str, description: str) -> str:
    file = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]+;", "", svg)
    # several drawings share one page: ids must not
    prefix = re.sub(r"\W", "-", key)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{prefix}-", svg)
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None
    svg = f'<svg {view[0]} role="img" aria-label="{html.escape(description)}">' + svg[svg.index(">") + 1 :]
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg
