"""Resident memory of the loader over many samples: does it stay flat?

    python scripts/benchmark/data_memory.py --samples 1000000 --workers 2 --out FILE.json

Makes shards of small JPEGs (more shards than a reader keeps open), streams samples from them through the training
loader, and notes the resident memory of this process and of its workers every twentieth of the way.
"""

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from bare_batch import to_batch
from PIL import Image

from blip2train.batch import ImageSpec
from blip2train.data.datamodule import BlipDataModule
from blip2train.data.image_transform import TrainTransform
from blip2train.data.mixture import Dataset
from blip2train.data.pack import pack_records

BATCH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--records", type=int, default=200_000, help="records in the shards")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pack_records(records(arguments.records), folder, samples_per_shard=1000)
        dataset = Dataset("synthetic", folder, TrainTransform(ImageSpec(32, (0.5,) * 3, (0.5,) * 3)))
        data = BlipDataModule({"synthetic": dataset}, to_batch, BATCH, arguments.workers)
        rows = measure(data, arguments.samples)
    for row in rows:
        print("{samples:>9} samples  {mib:>7.1f} MiB  {per_second:>6.0f} samples/s".format(**row))
    if arguments.out:
        arguments.out.write_text(json.dumps({**vars(arguments), "out": None, "rows": rows}, indent=2) + "\n")


def records(count: int) -> Iterator[dict[str, object]]:
    rng = np.random.default_rng(0)
    for index in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=60)
        fields = {"captions": [f"synthetic picture number {index}"], "image_id": index}
        yield {"key": f"{index:08d}", "image_bytes": buffer.getvalue(), "extension": "jpg", "json": fields}


def measure(data: BlipDataModule, num_samples: int) -> list[dict[str, float]]:
    rows, started = [], time.perf_counter()
    every = num_samples // BATCH // 20
    for number, _ in enumerate(data.train_dataloader(), start=1):
        if number % every == 0:
            seconds = time.perf_counter() - started
            rows.append({"samples": number * BATCH, "mib": resident_mib(), "per_second": number * BATCH / seconds})
        if number * BATCH >= num_samples:
            return rows
    raise AssertionError("the loader is endless")


def resident_mib() -> float:
    """Proportional memory of this process and its children: pages they share count once."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return sum(proportional_kib(process) for process in [str(os.getpid()), *children]) / 1024


def proportional_kib(process: str) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Pss:")))


if __name__ == "__main__":
    main()
