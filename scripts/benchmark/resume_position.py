"""How long a run of the paper's size needs to find its place again, and how much memory the order takes.

    python scripts/benchmark/resume_position.py --out scripts/benchmark/results/resume_position.json

Six sources in the paper's sizes, shards of 1000 records that exist as numbers alone. Times one process that resumes all
streams (one rank, reading in the training process): ranks and workers share the work.
"""

import argparse
import resource
import time
from pathlib import Path

from blip2train.data.order import DatasetOrder, MixtureOrder
from blip2train.run_dir import write_json

SIZES = {
    "laion_115m": 115_000_000, "cc12m": 12_000_000, "cc3m": 3_000_000, "sbu": 1_000_000, "coco": 113_000,
    "visual_genome": 100_000,
}  # fmt: skip
NUM_STREAMS = 64
RECORDS_PER_SHARD = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000_000, 10_000_000, 129_000_000])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    before = peak_mb()
    started = time.perf_counter()
    orders = [
        DatasetOrder([RECORDS_PER_SHARD] * (size // RECORDS_PER_SHARD), name=name, seed=0, num_streams=NUM_STREAMS,
                     window=1000)
        for name, size in SIZES.items()
    ]  # fmt: skip
    mixture = MixtureOrder(list(SIZES.values()), seed=0)
    rows = [{"what": "construct", "seconds": time.perf_counter() - started}]
    for samples in arguments.samples:
        started, cpu = time.perf_counter(), time.process_time()
        for stream in range(NUM_STREAMS):
            position = samples // NUM_STREAMS
            numbers = mixture.counts(stream, position)
            dataset = int(mixture.choices(stream, position, 1)[0])
            orders[dataset].record(stream, numbers[dataset])
        seconds = time.perf_counter() - started
        cpu = time.process_time() - cpu
        per_million = {"per_million": seconds * 1e6 / samples, "cpu_per_million": cpu * 1e6 / samples}
        rows.append({"what": f"resume after {samples} samples", "seconds": seconds, **per_million})
    started = time.perf_counter()
    for stream in range(NUM_STREAMS):
        for draw in range(2000):
            orders[0].record(stream, draw)
    rows.append({"what": "locate one record", "seconds": (time.perf_counter() - started) / NUM_STREAMS / 2000})
    rows.append({"what": "memory of the order", "megabytes": peak_mb() - before})
    for row in rows:
        print(row)
    if arguments.out:
        write_json(arguments.out, {"sources": SIZES, "num_streams": NUM_STREAMS, "rows": rows})


def peak_mb() -> float:
    """Largest resident size so far, in 1e6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
