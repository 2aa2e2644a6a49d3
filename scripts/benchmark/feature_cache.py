"""What training from cached features saves and costs: step times in turns, bytes, reading speed, error of each codec.

    python scripts/benchmark/feature_cache.py --photos PHOTOS --out scripts/benchmark/results/feature_cache.json

PHOTOS holds `captions.jsonl` and the JPEG files it names. Two models: the micro-world's, and ViT-B/16 with a Q-Former
of BERT-base's size at 224 pixels, whose weights are random (their values do not change the time). A step is what a
training does: read, decode, encode or decode tokens, all three losses, backward, AdamW. With and without features take
turns in one process, without loader workers, so that CPU time counts all of it; medians of the steps after the first.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import nn

from blip2train.cli.config import build, compose, quiet_libraries
from blip2train.cli.data_cache_features import run as cache_features
from blip2train.cli.features import with_features
from blip2train.data.feature_cache import read_facts
from blip2train.data.pack import pack
from blip2train.data.shards import ShardReader, open_shards
from blip2train.data.source.folder import FolderSource
from blip2train.microworld.pack import build_world
from blip2train.microworld.scene import WorldSpec
from blip2train.model.freezing import count_parameters
from blip2train.model.vision_encoder.token_codec import CODECS, decode_tokens
from blip2train.objective.context import build_context

BASE = [
    "model.vision_encoder.name=vit_base_patch16_224", "model.vision_encoder.layer=-2",
    "model.vision_encoder.final_norm=false", "model.vision_encoder.embed_dim=768", "~model.vision_encoder.model_args",
    "model.vision_encoder.image.size=224", "model/qformer=bert_base_32q", "model.qformer.vocab_size=30523",
    "data.datasets.microworld.name=photos", "data.collator.max_tokens=32",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--images", type=int, default=64, help="photographs used")
    parser.add_argument("--steps", type=int, default=8, help="of each kind, the first one not counted")
    parser.add_argument("--batch", type=int, default=8, help="of the ViT-B model")
    parser.add_argument(
        "--codecs", nargs="+", default=["bfloat16", "float16", "float8", "int8"], help="trains on the first"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build_world(WorldSpec(seed=0), root / "microworld", 480, 12)
        lines = (arguments.photos / "captions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (root / "captions.jsonl").write_text("".join(lines[: arguments.images]), encoding="utf-8")
        pack(FolderSource(arguments.photos, root / "captions.jsonl"), root / "photos")
        rows = [
            measure("micro-world", [f"paths.data={root}"], root, arguments),
            measure("ViT-B/16, BERT-base", base_overrides(root, arguments.batch), root, arguments),
        ]
    result = {
        "command": "scripts/benchmark/feature_cache.py",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": arguments.threads},
        "load_at_the_end": os.getloadavg()[0],
        "torch": torch.__version__,
        "models": rows,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


def base_overrides(root: Path, batch: int) -> list[str]:
    """ViT-B/16 with weights from a file, as a cache demands, on the photographs."""
    import timm

    torch.manual_seed(0)
    weights = root / "vit.safetensors"
    save_file(timm.create_model("vit_base_patch16_224", num_classes=0).state_dict(), weights)
    urls = f"data.datasets.microworld.urls=[{root}/photos/*.tar]"
    return [*BASE, f"model.vision_encoder.weights={weights}", f"data.batch_size={batch}", urls]


def measure(name: str, overrides: list[str], root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    common = ["experiment=microworld_stage1", f"run_dir={root}/run", "data.num_workers=0", *overrides]
    plain = compose("train", common)
    caches = root / name.split(",")[0].replace("/", "_")
    codecs = {codec: describe_codec(codec, common, caches) for codec in ["float32", *arguments.codecs]}
    folder = caches / arguments.codecs[0]
    trainings = {
        "uncached": training(plain),
        "cached": training(with_features(compose("train", [*common, f"features={folder}"]))),
    }
    seconds = {kind: {"wall": [], "cpu": []} for kind in trainings}
    for number in range(arguments.steps):
        for kind, step in trainings.items():
            start = time.perf_counter(), time.process_time()
            next(step)
            if number:
                seconds[kind]["wall"].append(time.perf_counter() - start[0])
                seconds[kind]["cpu"].append(time.process_time() - start[1])
    medians = {
        kind: {clock: statistics.median(values) for clock, values in each.items()} for kind, each in seconds.items()
    }
    encoder: nn.Module = build(plain.model.vision_encoder)
    return {
        "model": name,
        "cached_as": arguments.codecs[0],
        "batch": plain.data.batch_size,
        "seconds_per_step": medians,
        "times_faster": {clock: medians["uncached"][clock] / medians["cached"][clock] for clock in ("wall", "cpu")},
        "encoder_parameters_not_held": sum(count_parameters(encoder)),
        "codecs": codecs,
    }


def training(config: DictConfig) -> Iterator[float]:
    """Endless training steps; yields losses."""
    torch.manual_seed(0)
    loader = iter(build(config.data).train_dataloader())
    model = build(config.model).train()
    objectives = build(config.stage.objectives)
    optimizer, scheduler = build(config.optim)(model)
    for batch in loader:
        context = build_context(model, batch, gather_gradients=True)
        loss = torch.stack([objective.weight * objective(context).loss for objective in objectives.values()]).sum()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


def describe_codec(codec: str, common: list[str], folder: Path) -> dict[str, Any]:
    """Make a cache; its size, how fast it is made, read and decoded, and how far its values are off."""
    out = folder / codec
    start = time.perf_counter()
    cache_features(compose("data_cache_features", [*common, f"out={out}", f"codec={codec}", "device=cpu"]))
    made = time.perf_counter() - start
    facts = read_facts(out)
    (dataset,) = [path.parent for path in out.glob("*/index.json")]
    shards = open_shards(str(dataset))
    reader = ShardReader(shards)
    read = functools.partial(read_all, reader, [shard.num_records for shard in shards])
    records = read()
    start = time.perf_counter()
    records = read()
    reading = time.perf_counter() - start
    stored = torch.stack([torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in records[:64]])
    stored = stored.view(len(stored), facts.num_tokens, facts.token_bytes)
    start = time.perf_counter()
    tokens = decode_tokens(stored, CODECS[codec])
    decoding = time.perf_counter() - start
    return {
        "bytes_per_image": facts.bytes_per_image,
        "bytes_on_disk_per_image": sum(path.stat().st_size for path in dataset.glob("*.tar")) / len(records),
        "images_made_per_second": len(records) / made,
        "images_read_per_second_from_the_page_cache": len(records) / reading,
        "megabytes_read_per_second": len(records) * facts.bytes_per_image / reading / 1e6,
        "images_decoded_per_second": len(stored) / decoding,
        "rms_error": rms_error(tokens, folder / "float32"),
    }


def read_all(reader: ShardReader, sizes: list[int]) -> list[bytes]:
    return [reader.record(shard, index)["tokens"] for shard, size in enumerate(sizes) for index in range(size)]


def rms_error(tokens: torch.Tensor, exact: Path) -> float:
    """Against the float32 cache of the same encoder, as a share of the tokens' root mean square."""
    facts = read_facts(exact)
    shards = open_shards(str(next(exact.glob("*/index.json")).parent))
    records = read_all(ShardReader(shards), [shard.num_records for shard in shards])[: len(tokens)]
    stored = torch.stack([torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in records])
    true = decode_tokens(stored.view(len(stored), facts.num_tokens, facts.token_bytes), CODECS["float32"]).double()
    return float((tokens.double() - true).square().mean().sqrt() / true.square().mean().sqrt())


if __name__ == "__main__":
    main()
