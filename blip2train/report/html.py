"""Run folders -> report.html, one file that needs no other, and report.md with the same tables.

The page is read by people: every score stands beside what a guess, a model without an image and a perfect one would
reach, and beside the pictures it was measured on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2train.report.collect import Evaluation, Run, collect_runs
from blip2train.report.curve import NUM_COLORS, draw_curves
from blip2train.report.example import caption_examples, image_to_text, question_examples, text_to_image
from blip2train.report.page import render_template
from blip2train.report.score import (
    MEANING,
    Score,
    format_number,
    held_out_pairs,
    reference_kinds,
    scores_by_kind,
    scores_of,
)
from blip2train.report.table import comparison, paper_rows, paper_table, score_table
from blip2train.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class _Counts:
    """How many examples of each kind; even, or multiples of four, so that rows of cards are full."""

    captions: int
    questions: int
    text_queries: int
    image_queries: int


_MOST_WARNINGS = 30
_MANY, _FEW = _Counts(12, 12, 6, 4), _Counts(4, 4, 2, 2)


def build_report(runs: Sequence[RunDir], out: Path, title: str, phases: Mapping[str, float] | None = None) -> Path:
    """Write `out`/report.html and `out`/report.md about one or more runs; returns the path of the page.

    Whatever the folders hold is shown and the rest left out: a stage-1 run alone gives curves and retrieval, several
    runs of one stage a comparison.

    Args:
        runs: run folders, the main one first.
        out: folder, created if missing.
        title: headline of the page.
        phases: wall seconds by name, in order, if somebody timed them.
    """
    collected = collect_runs(runs)
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.html"
    page.write_text(render(collected, title, phases or {}), encoding="utf-8")
    tables = [f"# {title}", score_table(collected), paper_table(collected)]
    (out / "report.md").write_text("\n".join(filter(None, tables)), encoding="utf-8")
    return page


def render(runs: Sequence[Run], title: str, phases: Mapping[str, float]) -> str:
    """The page's HTML."""
    scores = [score for run in runs for score in scores_of(run)]
    # several runs of one benchmark are compared in a table; the rest of the page is about the first of them
    first = {name: run.name for run in reversed(runs) for name in (found.benchmark for found in run.evaluations)}
    main = [score for score in scores if first[score.benchmark] == score.run]
    galleries = [_gallery(run, found, first) for run in runs for found in run.evaluations]
    return render_template(
        "template.html.j2",
        filters={"number": format_number, "seconds": format_seconds},
        title=title,
        made=time.strftime("%d %B %Y, %H:%M"),
        runs=runs,
        num_colors=NUM_COLORS,
        meaning=MEANING,
        headlines=[score for score in main if score.question and not score.held_out],
        pairs=[pair for pair in held_out_pairs(main) if pair[0].question],
        scores=scores,
        kinds=reference_kinds(scores),
        question_kinds=_question_kinds(runs, first),
        bridging=next((score for score in main if score.metric == "bridging_efficiency"), None),
        comparison=comparison(runs),
        paper=paper_rows(runs),
        curves=draw_curves(runs),
        warned=[(run.name, run.warnings[-_MOST_WARNINGS:], len(run.warnings)) for run in runs if run.warnings],
        galleries=[gallery for gallery in galleries if gallery["examples"]],
        phases=phases,
        total=sum(phases.values()),
        facts=[(run, _facts(run)) for run in runs],
    )


def format_seconds(seconds: float) -> str:
    """Seconds below two minutes, then minutes and hours."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{seconds / 60:.1f} min"


def _gallery(run: Run, evaluation: Evaluation, first: Mapping[str, str]) -> dict[str, Any]:
    """Examples of one evaluation under the kind of layout they need; few of held-out sets and of further runs."""
    main = first[evaluation.benchmark] == run.name
    counts = _MANY if main and not evaluation.held_out else _FEW
    name = evaluation.task + (", new combinations" if evaluation.held_out else "") + ("" if main else f", {run.name}")
    if any("direction" in row for row in evaluation.predictions):
        by_text = text_to_image(evaluation, counts.text_queries)
        by_image = image_to_text(evaluation, counts.image_queries)
        rankings = {"text_to_image": by_text, "image_to_text": by_image} if by_text or by_image else {}
        return {"name": name, "layout": "retrieval", "examples": rankings}
    if any("question" in row for row in evaluation.predictions):
        return {"name": name, "layout": "questions", "examples": question_examples(evaluation, counts.questions)}
    return {"name": name, "layout": "captions", "examples": caption_examples(evaluation, counts.captions)}


def _question_kinds(runs: Sequence[Run], first: Mapping[str, str]) -> list[tuple[Evaluation, list[str], list[Score]]]:
    found = [
        (evaluation, scores_by_kind(run, evaluation))
        for run in runs
        for evaluation in run.evaluations
        if first[evaluation.benchmark] == run.name
    ]
    return [(evaluation, reference_kinds(scores), scores) for evaluation, scores in found if len(scores) > 1]


def _facts(run: Run) -> list[tuple[str, str]]:
    """The manifest as lines; nested values as compact JSON."""
    return [
        (key.replace("_", " "), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in run.manifest.items()
        if value is not None and key != "chance_levels"
    ]
