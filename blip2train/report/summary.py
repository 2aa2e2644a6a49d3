"""One stage-1 and one stage-2 run of the micro-world -> summary.json, the few numbers that other programs read.

Keys are fixed; percent for recalls and accuracies, CIDEr where 1.0 is what papers print as 100, seconds of wall time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip2train.errors import ConfigError
from blip2train.report.collect import HELD_OUT_SUFFIX
from blip2train.run_dir import RunDir, write_json

STAGE1_KEYS = ("text_recall@1", "image_recall@1", "text_recall@1_itm", "image_recall@1_itm", "candidates", "chance")
STAGE2_KEYS = ("vqa_accuracy", "vqa_blind", "vqa_shuffled", "caption_cider", "caption_cider_shuffled")
# known only where the benchmark has the truth to compute them from
STAGE1_EXTRA = ("image_recall@1_ceiling", "text_recall@1_ceiling")
STAGE2_EXTRA = ("vqa_oracle", "bridging_efficiency", "caption_true", "caption_true_shuffled", "caption_true_one_object")


def write_summary(
    stage1: RunDir,
    stage2: RunDir,
    out: Path,
    seconds: float,
    phases: Mapping[str, float],
    *,
    retrieval: str = "microworld_retrieval",
    caption: str = "microworld_caption",
    vqa: str = "microworld_vqa",
) -> Path:
    """Write `out`/summary.json from the evaluations in two run folders; returns its path.

    `out_of_domain` holds the same keys for the benchmarks with the held-out suffix, both nested by stage and flat.

    Raises:
        ConfigError: a benchmark was not evaluated, or lacks a number.
    """
    inside = _numbers(stage1, stage2, retrieval, caption, vqa)
    outside = _numbers(stage1, stage2, *(f"{name}{HELD_OUT_SUFFIX}" for name in (retrieval, caption, vqa)))
    flat = {key: value for stage in outside.values() for key, value in stage.items()}
    rounded_phases = {name: round(value, 1) for name, value in phases.items()}
    summary: dict[str, Any] = {"seconds": round(seconds, 1), **inside}
    summary["out_of_domain"] = {**outside, **flat}
    summary["phases"] = rounded_phases
    path = out / "summary.json"
    write_json(path, summary)
    return path


def summarize(runs: Sequence[RunDir], out: Path) -> Path:
    """Write `out`/summary.json for any runs; returns its path.

    One stage-1 and one stage-2 run of the micro-world give the form of `write_summary`, with their training seconds;
    anything else gives `{"runs": {folder: {benchmark: metrics}}}`.
    """
    first = [run for run in runs if "microworld_retrieval" in run.benchmarks()]
    second = [run for run in runs if "microworld_vqa" in run.benchmarks()]
    if len(runs) == 2 and len(first) == len(second) == 1:
        phases = {run.path.name: float(run.read_manifest().get("train_seconds", 0.0)) for run in runs}
        return write_summary(first[0], second[0], out, sum(phases.values()), phases)
    path = out / "summary.json"
    scores = {str(run.path): {name: run.read_eval(name)[0] for name in run.benchmarks()} for run in runs}
    write_json(path, {"runs": scores})
    return path


def _numbers(
    stage1: RunDir, stage2: RunDir, retrieval: str, caption: str, vqa: str
) -> dict[str, dict[str, float | int]]:
    first = _metrics(stage1, retrieval)
    second = {**_metrics(stage2, caption), **_metrics(stage2, vqa)}
    return {
        "stage1": _pick(first, STAGE1_KEYS, STAGE1_EXTRA, retrieval),
        "stage2": _pick(second, STAGE2_KEYS, STAGE2_EXTRA, f"{caption} and {vqa}"),
    }


def _metrics(run: RunDir, benchmark: str) -> dict[str, Any]:
    if benchmark not in run.benchmarks():
        raise ConfigError(
            f"{benchmark} was not evaluated (there is: {', '.join(run.benchmarks()) or 'nothing'})",
            where=f"{run.path}/eval",
            fix=f"blip2train evaluate run={run.path} benchmark={benchmark}",
        )
    return run.read_eval(benchmark)[0]


def _pick(
    metrics: Mapping[str, Any], required: tuple[str, ...], extra: tuple[str, ...], where: str
) -> dict[str, float | int]:
    missing = [key for key in required if key not in metrics]
    if missing:
        raise ConfigError(
            f"no {', '.join(missing)} among the metrics",
            where=f"evaluation of {where}",
            fix="evaluate with its controls on (blind, shuffled, rerank_top_k above 0)",
        )
    found = {key: metrics[key] for key in (*required, *extra) if key in metrics}
    return {key: int(value) if key == "candidates" else round(float(value), 3) for key, value in found.items()}
