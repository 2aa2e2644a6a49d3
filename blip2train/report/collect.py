"""Run folders -> what a report shows (the arrow from eval/<benchmark>/ to report/); reads text files, imports no torch.

The folder is the whole interface: a run from another machine, or with other benchmarks, is shown the same way. LAVIS
leaves a log file per run and no way to put two of them side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2train.run_dir import RunDir

HELD_OUT_SUFFIX = "_out"
"""A benchmark `x_out` is the held-out partner of `x`: the same questions on combinations never seen in training."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One benchmark of one run; `pictures` are JPEG files by record key."""

    benchmark: str
    metrics: Mapping[str, float]
    predictions: Sequence[Mapping[str, Any]]
    pictures: Mapping[str, Path]

    @property
    def task(self) -> str:
        """The benchmark's name without the held-out suffix."""
        return self.benchmark.removesuffix(HELD_OUT_SUFFIX)

    @property
    def held_out(self) -> bool:
        return self.benchmark.endswith(HELD_OUT_SUFFIX)


@dataclass(frozen=True, slots=True)
class Run:
    """Everything a report needs of one run folder; missing files are empty values."""

    name: str
    manifest: Mapping[str, Any]
    config: str
    steps: Sequence[Mapping[str, float]]
    evaluations: Sequence[Evaluation] = field(default_factory=list)
    warnings: Sequence[Mapping[str, Any]] = field(default_factory=list)

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one logged quantity; steps where it is missing or not finite are left out."""
        points = [(row["step"], row[key]) for row in self.steps if _finite(row.get(key))]
        return [step for step, _ in points], [value for _, value in points]


def collect_runs(runs: Sequence[RunDir]) -> list[Run]:
    """Read run folders; each is named by the shortest end of its path that no other shares."""
    names = _short_names([run.path for run in runs])
    return [_collect(run, name) for run, name in zip(runs, names, strict=True)]


def _collect(run: RunDir, name: str) -> Run:
    evaluations = []
    for benchmark in run.benchmarks():
        metrics, predictions = run.read_eval(benchmark)
        numbers = {key: float(value) for key, value in metrics.items() if _finite(value)}
        evaluations.append(Evaluation(benchmark, numbers, predictions, run.eval_images(benchmark)))
    config = run.config_path.read_text(encoding="utf-8") if run.config_path.is_file() else ""
    return Run(name, run.read_manifest(), config, run.read_metrics(), evaluations, run.read_warnings())


def _short_names(paths: Sequence[Path]) -> list[str]:
    resolved = [path.resolve() for path in paths]
    for length in range(1, max((len(path.parts) for path in resolved), default=0) + 1):
        names = ["/".join(path.parts[-length:]) for path in resolved]
        if len(set(names)) == len(set(resolved)):
            return names
    return []


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
