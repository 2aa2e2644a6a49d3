"""Runs the quickstart over seeds and writes what it scored, with the hardware, to scripts/benchmark/results/.

    python scripts/benchmark/quickstart_seeds.py --seeds 0 1 2 --out outputs/seeds

A seed whose summary.json is already there is not run again. Overrides after `--` go to every run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SHOWN = (
    ("seconds",),
    ("stage1", "text_recall@1"),
    ("stage1", "image_recall@1"),
    ("stage1", "image_recall@1_ceiling"),
    ("stage1", "text_recall@1_itm"),
    ("stage1", "image_recall@1_itm"),
    ("stage2", "vqa_accuracy"),
    ("stage2", "vqa_blind"),
    ("stage2", "vqa_shuffled"),
    ("stage2", "vqa_oracle"),
    ("stage2", "caption_cider"),
    ("stage2", "caption_cider_shuffled"),
    ("stage2", "caption_true"),
    ("out_of_domain", "stage1", "text_recall@1"),
    ("out_of_domain", "stage1", "image_recall@1"),
    ("out_of_domain", "stage2", "vqa_accuracy"),
    ("out_of_domain", "stage2", "caption_cider"),
)


def hardware() -> dict[str, str | int | None]:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def value(summary: dict, path: tuple[str, ...]) -> float:
    for key in path:
        summary = summary[key]
    return float(summary)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs/seeds"))
    parser.add_argument("--name", default="quickstart", help="name of the result file")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    summaries = {}
    for seed in arguments.seeds:
        folder = arguments.out / f"seed{seed}"
        if not (folder / "summary.json").is_file():
            command = [sys.executable, "-m", "blip2train.cli.quickstart", f"seed={seed}", f"out={folder}"]
            subprocess.run([*command, *arguments.overrides], check=True)
        summaries[seed] = json.loads((folder / "summary.json").read_text())
    rows = {"/".join(path): [round(value(summaries[seed], path), 2) for seed in arguments.seeds] for path in SHOWN}
    result = {
        "command": "blip2train quickstart seed=SEED " + " ".join(arguments.overrides),
        "hardware": hardware(),
        "seeds": arguments.seeds,
        "by_seed": rows,
        "mean": {name: round(statistics.mean(values), 2) for name, values in rows.items()},
        "phases": {seed: summary["phases"] for seed, summary in summaries.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, values in rows.items():
        print(f"{name:<40}", *(f"{item:8.2f}" for item in values))


if __name__ == "__main__":
    main()
