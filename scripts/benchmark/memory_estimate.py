"""How far `blip2train show estimate` is from what a step allocates: fake tensors against the allocator's own log.

    python scripts/benchmark/memory_estimate.py --out scripts/benchmark/results/memory_estimate.json
    python scripts/benchmark/memory_estimate.py --device cuda           # against torch.cuda.max_memory_allocated

Every case runs one real step with random weights. On the CPU the oracle is torch's profiler, which logs each allocation
and release of the allocator, kernels' workspaces included; the estimate then counts the CPU's kernels, too.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from blip2train.cli.config import build, compose, quiet_libraries
from blip2train.cli.dry_step import run_step
from blip2train.cli.estimate import estimate, full_batch, loss_of
from blip2train.cli.meta import without_weights
from blip2train.model.memory import GIB, parse_precision

BASE = [  # ViT-B/16 and BERT-base with 32 queries: the smallest that is no toy
    "model.vision_encoder.name=vit_base_patch16_224", "model.vision_encoder.weights=null",
    "model.vision_encoder.layer=-2", "model.vision_encoder.final_norm=false", "model.vision_encoder.embed_dim=768",
    "~model.vision_encoder.model_args", "model.vision_encoder.image.size=224", "model/qformer=bert_base_32q",
    "data.batch_size=8", "data.collator.max_tokens=32",
]  # fmt: skip
OPT_SMALL = {
    "model_type": "opt", "hidden_size": 768, "word_embed_proj_dim": 768, "num_hidden_layers": 12, "ffn_dim": 3072,
    "num_attention_heads": 12, "vocab_size": 50272, "max_position_embeddings": 2048,
}  # fmt: skip
T5_SMALL = {
    "model_type": "t5", "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6,
    "feed_forward_proj": "gated-gelu", "vocab_size": 32128, "tie_word_embeddings": False, "decoder_start_token_id": 0,
}  # fmt: skip
CASES: dict[str, tuple[str, list[str], dict[str, Any] | None]] = {
    "stage 1, micro-world": ("microworld_stage1", [], None),
    "stage 2, micro-world, OPT": ("microworld_stage2_opt", [], None),
    "stage 2, micro-world, T5": ("microworld_stage2_t5", [], None),
    "stage 1, ViT-B/16, BERT-base, batch 8": ("microworld_stage1", BASE, None),
    "stage 1, the same with activation checkpointing": (
        "microworld_stage1", [*BASE, "model.qformer.checkpoint_activations=true"], None,
    ),
    "stage 1, the same with the vision encoder trained": (
        "microworld_stage1", [*BASE, "model.vision_encoder.trainable_blocks=all"], None,
    ),
    "stage 2, ViT-B/16, BERT-base, OPT-125M's shape, batch 8": ("microworld_stage2_opt", BASE, OPT_SMALL),
    "stage 2, ViT-B/16, BERT-base, Flan-T5-small's shape, batch 8": ("microworld_stage2_t5", BASE, T5_SMALL),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="parts of their names")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    rows = [
        compare(name, precision, arguments.device)
        for name in CASES
        if any(wanted in name for wanted in arguments.cases)
        for precision in arguments.precision
    ]
    if arguments.out:
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "cpu"
        facts = {"command": "scripts/benchmark/memory_estimate.py", "device": device, "torch": torch.__version__}
        arguments.out.write_text(json.dumps(facts | {"unit": "bytes", "cases": rows}, indent=1) + "\n")


def compare(name: str, precision: str, device: str) -> dict[str, Any]:
    experiment, overrides, architecture = CASES[name]
    overrides = [
        f"experiment={experiment}",
        "run_dir=x",
        "trainer.devices=1",
        f"trainer.precision={precision}",
        *overrides,
    ]
    config = compose("train", overrides)
    if architecture:
        with open_dict(config):
            config.llm.path, config.llm.architecture = "none", architecture
    step = estimate(config, accelerator=device == "cuda").step
    kept, peak = (real_cuda if device == "cuda" else real_cpu)(config)
    row = {
        "case": name, "precision": precision,
        "estimated_kept": sum(step.kept.values()), "real_kept": kept,
        "estimated_peak": sum(step.peak.values()), "real_peak": peak,
    }  # fmt: skip
    for what in ("kept", "peak"):
        row[f"{what}_error_percent"] = round(100 * (row[f"estimated_{what}"] / row[f"real_{what}"] - 1), 2)
    print(f"{name}, {precision}: kept {row['estimated_kept'] / GIB:.3f} of {kept / GIB:.3f} GiB "
          f"({row['kept_error_percent']:+.1f} %), peak {row['estimated_peak'] / GIB:.3f} of {peak / GIB:.3f} GiB "
          f"({row['peak_error_percent']:+.1f} %)", flush=True)  # fmt: skip
    return row


def real_model(config: DictConfig, device: str) -> nn.Module:
    with open_dict(config):
        config.model = without_weights(config)
    torch.manual_seed(0)
    model: nn.Module = build(config.model)
    return model.to(device).train()


def padded_batch(config: DictConfig, model: nn.Module) -> Any:
    """As estimated, but for one token of padding: real batches have some, and transformers drops a full mask."""
    batch = full_batch(config, model)
    for field in batch.__slots__:
        if field.endswith("_mask") and getattr(batch, field).shape[1]:
            getattr(batch, field)[0, -1] = False
    return batch


def real_cpu(config: DictConfig) -> tuple[int, int]:
    """Bytes that the allocator had given out when the loss was known, and at the highest point."""
    model = real_model(config, "cpu")

    def mark() -> None:
        with record_function("loss known"):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        run_step(
            model,
            loss_of(config, model),
            lambda: padded_batch(config, model),
            autocast=autocast_of(config),
            on_loss_known=mark,
        )
    events = log.profiler.kineto_results.events()
    known = next(event.start_ns() for event in events if event.name() == "loss known")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    total = peak = kept = 0
    for moment, size in changes:
        total += size
        peak = max(peak, total)
        kept = total if moment <= known else kept
    return kept, peak


def real_cuda(config: DictConfig) -> tuple[int, int]:
    """The same two numbers from CUDA's caching allocator, less the weights."""
    model = real_model(config, "cuda")
    kept, before = 0, torch.cuda.memory_allocated()

    def on_device() -> Any:
        batch = padded_batch(config, model)
        for field in batch.__slots__:
            if isinstance(getattr(batch, field), torch.Tensor):
                setattr(batch, field, getattr(batch, field).cuda())
        return batch

    def mark() -> None:
        nonlocal kept
        kept = torch.cuda.memory_allocated() - before

    torch.cuda.reset_peak_memory_stats()
    run_step(
        model,
        loss_of(config, model),
        on_device,
        device="cuda",
        autocast=autocast_of(config),
        on_loss_known=mark,
    )
    return kept, torch.cuda.max_memory_allocated() - before


def autocast_of(config: DictConfig) -> torch.dtype | None:
    return parse_precision(str(config.trainer.precision)).autocast


if __name__ == "__main__":
    main()
