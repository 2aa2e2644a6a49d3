"""Runs -> Markdown tables: every score with its baselines, runs side by side, and the paper's numbers where they exist.

What README's results table is made of. Paper rows come from `paper.py` with their table number; a benchmark that the
paper does not have (the micro-world) gets none.
"""

from __future__ import annotations

from collections.abc import Sequence

from blip2train.report.collect import Run
from blip2train.report.paper import PAPER
from blip2train.report.score import Score, format_number, reference_kinds, scores_of


def score_table(runs: Sequence[Run]) -> str:
    """Markdown: one line per score, a column per kind of reference point that any score has."""
    scores = [score for run in runs for score in scores_of(run)]
    kinds = reference_kinds(scores)
    lines = [_line(["run", "benchmark", "metric", "score", *kinds]), _line(["---"] * (4 + len(kinds)))]
    for score in scores:
        cells = [_cell(score, kind) for kind in kinds]
        lines.append(_line([score.run, score.benchmark, score.label, f"**{score.text}**", *cells]))
    return "\n".join(lines) + "\n"


def comparison(runs: Sequence[Run]) -> list[tuple[str, str, list[Score | None]]]:
    """(benchmark, label, one score per run) for what at least two runs have."""
    found = {run.name: {(score.benchmark, score.metric): score for score in scores_of(run)} for run in runs}
    keys = dict.fromkeys(key for scores in found.values() for key in scores)
    rows = []
    for key in keys:
        scores = [found[run.name].get(key) for run in runs]
        known = [score for score in scores if score is not None]
        if len(known) > 1:
            rows.append((key[0], known[0].label, scores))
    return rows


def paper_table(runs: Sequence[Run]) -> str:
    """Markdown: the runs' scores above the paper's, per benchmark; empty if the paper has none of them."""
    blocks = []
    for benchmark, label, unit, rows in paper_rows(runs):
        lines = [f"{benchmark}: {label}", "", _line(["model", "score", "source"]), _line(["---"] * 3)]
        lines += [_line([model, format_number(value, unit), source]) for model, value, source in rows]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def paper_rows(runs: Sequence[Run]) -> list[tuple[str, str, str, list[tuple[str, float, str]]]]:
    """(benchmark, label, unit, [(model, value, source)]) with our runs first, for metrics that the paper prints."""
    tables: dict[tuple[str, str], list[Score]] = {}
    for score in (score for run in runs for score in scores_of(run)):
        if any(score.metric in row.values for row in PAPER.get(score.benchmark, ())):
            tables.setdefault((score.benchmark, score.metric), []).append(score)
    result = []
    for (benchmark, metric), scores in tables.items():
        ours = [(score.run, score.value, "this report") for score in scores]
        theirs = [(row.model, row.values[metric], row.source) for row in PAPER[benchmark] if metric in row.values]
        result.append((benchmark, scores[0].label, scores[0].unit, ours + theirs))
    return result


def _cell(score: Score, kind: str) -> str:
    return format_number(score.references[kind], score.unit) if kind in score.references else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
