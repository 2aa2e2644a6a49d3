"""One device, real sizes: both stages of the paper's ViT-g models train, save and resume under DDP and ZeRO-2.

Weights are random and pictures and captions the micro-world's: sizes, memory and time are real, losses mean nothing.
    python scripts/benchmark/gpu_check.py                       # needs a GPU; writes results/gpu_check.json
    python scripts/benchmark/gpu_check.py --device cpu --tiny   # dry run of every command, with tiny models
Each command ends within ten minutes or counts as failed. Exit code 1 where anything failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
STEPS, CUT = 6, 3
COMMAND_SECONDS = 600
RESUME_TOLERANCE = 1e-2
"""Relative, of losses in bfloat16: CUDA's kernels add in an order of their own."""
TRAINERS = ("ddp", "deepspeed_zero2")
UNPROVEN = (
    "more than one device: NCCL, and the time its collectives take",
    "memory that sharding saves: one device shards nothing",
    "data loading at speed: pictures here are small and few",
)


def stages(tiny: bool) -> dict[str, list[str]]:
    """Overrides of each stage, by the name of the preset whose sizes they have."""
    first, second = ["experiment=microworld_stage1"], ["experiment=microworld_stage2_opt", "init_from=scratch"]
    if tiny:
        return {"stage1": [*first, "data.batch_size=4"], "stage2": [*second, "data.batch_size=4"]}
    models = ROOT / "configs" / "model"
    opt = OmegaConf.to_container(OmegaConf.load(models / "language_model" / "opt_2_7b.yaml").architecture)
    shape = ",".join(f"{key}:{value}" for key, value in dict(opt).items())
    sizes = ["model/vision_encoder=eva_clip_g", "model.vision_encoder.pretrained=false", "model/qformer=bert_base_32q"]
    return {
        "stage1_vitg": [
            *first,
            *sizes,
            "model.qformer.vocab_size=30523",
            "model.contrastive_dim=256",
            "data.batch_size=105",
        ],
        "stage2_vitg_opt_2_7b": [
            *(*second, *sizes, "data.batch_size=120", "llm.model.dtype=float16"),
            f"llm.model.path_or_config={{{shape},pad_token_id:1,bos_token_id:2,eos_token_id:2}}",
        ],
    }


def train(overrides: list[str], log: Path) -> float:
    """Run `blip2train train`; returns its seconds.

    Raises:
        RuntimeError: it failed or took too long; names its log.
    """
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as out:
        try:
            command = [sys.executable, "-m", "blip2train.cli.train", *overrides]
            subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=True, timeout=COMMAND_SECONDS, cwd=ROOT)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            end = log.read_text(encoding="utf-8")[-1500:]
            raise RuntimeError(f"{error.__class__.__name__}, see {log}:\n{end}") from error
    return time.perf_counter() - started


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def check(name: str, overrides: list[str], out: Path) -> dict[str, Any]:
    """Train, then continue from the middle in a second folder; the figures of both."""
    whole, again = out / name, out / f"{name}_resumed"
    seconds = train([*overrides, f"run_dir={whole}"], out / f"{name}.log")
    cut = whole / "checkpoints" / f"step-{CUT:07d}"
    train([*overrides, f"run_dir={again}", f"resume={cut}"], out / f"{name}_resumed.log")
    before, after = rows(whole), rows(again)
    batch = next(
        int(item.removeprefix("data.batch_size=")) for item in overrides if item.startswith("data.batch_size=")
    )
    apart = max(abs(a["train/loss"] / b["train/loss"] - 1) for a, b in zip(after, before, strict=True))
    return {
        "losses": [row["train/loss"] for row in before],
        "resumed_losses_differ_by": apart,
        "resumed": apart <= RESUME_TOLERANCE and (again / "checkpoints" / f"step-{STEPS:07d}").is_dir(),
        "step_seconds": min(batch / row["samples_per_second"] for row in before[1:]),
        "peak_memory_gb": max(row["memory_gb"] for row in before),
        "checkpoint_mb": sum(file.stat().st_size for file in cut.iterdir()) / 1e6,
        "start_to_end_seconds": seconds,
    }


def run(device: str, tiny: bool, out: Path) -> dict[str, Any]:
    """All cases; a failure is noted and the next one runs."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    data = f"paths.data={out / 'data'}"
    world = ["train_images=64", "val_images=8"] if tiny else ["train_images=1024", "val_images=16"]
    subprocess.run([sys.executable, "-m", "blip2train.cli.microworld", "build", data, *world], check=True, cwd=ROOT)
    common = [data, f"trainer.max_steps={STEPS}", "optim.warmup_steps=1", "log_every_steps=1", "data.num_workers=1"]
    common += [
        f"checkpoint.every_steps={CUT}",
        "checkpoint.keep_last=0",
        "trainer.devices=1",
        f"trainer.accelerator={device}",
    ]
    cases: dict[str, Any] = {}
    for stage, overrides in stages(tiny).items():
        for trainer in TRAINERS:
            name = f"{stage}_{trainer}"
            print(f"{name} ...", flush=True)
            try:
                cases[name] = check(
                    name, [*overrides, f"trainer={trainer}", "trainer.precision=bf16-mixed", *common], out
                )
            except RuntimeError as error:
                cases[name] = {"failed": str(error)}
            print(json.dumps(cases[name], indent=2), flush=True)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="gpu", choices=["gpu", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="tiny models: a dry run")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu_check", help="emptied first")
    parser.add_argument("--results", type=Path, help="results/gpu_check.json beside this file, but for a dry run")
    chosen = parser.parse_args()
    import torch

    if chosen.device == "gpu" and not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was checked. --device cpu --tiny tries the commands alone")
    name = torch.cuda.get_device_name() if chosen.device == "gpu" else "CPU, a dry run"
    cases = run(chosen.device, chosen.tiny, chosen.out.absolute())
    failed = [case for case, figures in cases.items() if not figures.get("resumed")]
    dry = chosen.device == "cpu" or chosen.tiny
    unproven = [*(["everything on a GPU and at real sizes"] if dry else []), *failed, *UNPROVEN]
    facts = {"device": name, "torch": torch.__version__, "tiny": chosen.tiny, "cases": cases, "unproven": unproven}
    results = chosen.results or (None if dry else Path(__file__).parent / "results" / "gpu_check.json")
    if results is not None:
        results.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print("unproven:\n  " + "\n  ".join(unproven))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
