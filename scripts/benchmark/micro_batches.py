"""What `stage.micro_batch_size` saves and costs: memory and CPU time of a stage-1 step, losses and gradient norm.

    python scripts/benchmark/micro_batches.py --out scripts/benchmark/results/micro_batches.json

ViT-B/16 at 224 pixels, a Q-Former of BERT-base's size with dropout, random weights, texts of 32 tokens, float32, one
thread, all three losses, no optimizer. Each setting has a process of its own; its first step is not timed. `memory_gb`
is the peak of what a step makes (`LiveMemory`), gradients counted and weights not; `resident_gb` the process's largest
resident size. Losses differ by the masks of dropout.
The committed figures: `--batch 12 --micro 0 3 --steps 1 --layers 4`.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from blip2train.cli.config import build, compose
from blip2train.model.live_memory import LiveMemory
from blip2train.objective.context import build_context
from blip2train.run_dir import read_json, write_json
from blip2train.stage.probe import empty_stage1_batch

SIZES = [
    "experiment=microworld_stage1", "run_dir=x", "model.vision_encoder.name=vit_base_patch16_224",
    "model.vision_encoder.layer=-2", "model.vision_encoder.final_norm=false", "model.vision_encoder.embed_dim=768",
    "~model.vision_encoder.model_args", "model.vision_encoder.image.size=224", "model.vision_encoder.weights=null",
    "model/qformer=bert_base_32q", "model.qformer.vocab_size=30523", "data.collator.max_tokens=32",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro", type=int, nargs="+", default=[0, 4, 2, 1], help="0: the whole batch at once")
    parser.add_argument("--steps", type=int, default=2, help="timed ones")
    parser.add_argument("--layers", type=int, default=12, help="of the Q-Former")
    parser.add_argument("--one", type=int, help="measure this setting alone, in this process")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.one is not None:
        write_json(arguments.out, measure(arguments.batch, arguments.one or None, arguments.steps, arguments.layers))
        return
    rows = []
    for micro in arguments.micro:
        part = Path(f"{arguments.out}.part")
        numbers = ["--batch", str(arguments.batch), "--steps", str(arguments.steps), "--one", str(micro)]
        numbers += ["--layers", str(arguments.layers)]
        subprocess.run([sys.executable, __file__, *numbers, "--out", part], check=True)
        rows.append(read_json(part))
        part.unlink()
        rows[-1]["memory_of_whole"] = round(rows[-1]["memory_gb"] / rows[0]["memory_gb"], 3)
        rows[-1]["time_of_whole"] = round(rows[-1]["cpu_seconds"] / rows[0]["cpu_seconds"], 3)
        print(rows[-1])
    write_json(arguments.out, {"batch": arguments.batch, "layers": arguments.layers, "rows": rows})


def measure(batch_size: int, micro_batch_size: int | None, steps: int, layers: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    config = compose("train", [*SIZES, f"model.qformer.num_layers={layers}"])
    torch.manual_seed(0)
    model = build(config.model).train()
    objectives = build(config.stage.objectives)
    batch = empty_stage1_batch(model.vision_encoder, batch_size, 32)
    batch.images.random_(generator=torch.Generator().manual_seed(0))
    batch.input_ids.random_(1000, 30000, generator=torch.Generator().manual_seed(1))

    def step() -> torch.Tensor:
        torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        context = build_context(model, batch, micro_batch_size=micro_batch_size)
        loss = torch.stack([objective(context).loss for objective in objectives.values()]).sum()
        loss.backward()
        return loss

    with LiveMemory([*model.parameters(), *model.buffers()]) as memory:
        loss = step()
    started = time.process_time()
    for _ in range(steps):
        step()
    seconds = (time.process_time() - started) / steps
    gradients = [item.grad for item in model.parameters() if item.grad is not None]
    return {
        "micro_batch_size": micro_batch_size,
        "memory_gb": round(sum(memory.peak.values()) / 1e9, 3),
        "resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
        "cpu_seconds": round(seconds, 2),
        "loss": loss.item(),
        "gradient_norm": float(torch.nn.utils.get_total_norm(gradients)),
    }


if __name__ == "__main__":
    main()
