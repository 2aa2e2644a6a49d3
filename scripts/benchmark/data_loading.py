"""How fast records become batches on this machine, step by step.

    python scripts/benchmark/data_loading.py 'data/coco/*.tar' --size 224 --workers 0 1 2

Prints samples per second: of wall time for the loader, of CPU time for the single steps (one core, one thread).
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice

import torch
from bare_batch import to_batch

from blip2train.batch import ImageSpec
from blip2train.data.datamodule import BlipDataModule
from blip2train.data.image_transform import EvalTransform, TrainTransform, decode_image
from blip2train.data.mixture import Dataset, Mixture
from blip2train.data.shards import IMAGE_EXTENSIONS, RawRecord, ShardReader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="+", help="shards: paths, globs, folders")
    parser.add_argument("--size", type=int, default=224, help="side of the square image in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2000, help="samples per measurement")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    records = list(islice(stream(arguments.urls), arguments.samples))
    num_bytes = sum(len(encoded(record)) for record in records)
    print(f"{len(records)} records, {num_bytes / len(records) / 1000:.1f} KB per image")
    images = [decode_image(encoded(record)) for record in records]
    spec = ImageSpec(arguments.size, (0.5,) * 3, (0.5,) * 3)
    train, evaluation, generator = TrainTransform(spec), EvalTransform(spec), torch.Generator()
    report("read", lambda: islice(stream(arguments.urls), arguments.samples))
    report("decode", lambda: (decode_image(encoded(record)) for record in records))
    report("train transform", lambda: (train(image, generator) for image in images))
    report("eval transform", lambda: (evaluation(image) for image in images))
    for num_workers in arguments.workers:
        dataset = Dataset("benchmark", arguments.urls, train)
        data = BlipDataModule({"benchmark": dataset}, to_batch, arguments.batch_size, num_workers)
        measure_loader(data, arguments.samples)


def stream(urls: list[str]) -> Iterator[RawRecord]:
    """Records in training order."""
    mixture = Mixture([Dataset("benchmark", urls, EvalTransform(ImageSpec(64, (0.5,) * 3, (0.5,) * 3)))], seed=0)
    reader = ShardReader(mixture.shards[0])
    for number in count():
        place = mixture.orders[0].record(number % mixture.num_streams, number // mixture.num_streams)
        yield reader.record(place.shard, place.index)


def encoded(record: RawRecord) -> bytes:
    return next(record[extension] for extension in IMAGE_EXTENSIONS if extension in record)


def report(name: str, run: Callable[[], Iterable[object]]) -> None:
    start = time.process_time()
    number = sum(1 for _ in run())
    print(f"{name:>16}  {number / (time.process_time() - start):>8.0f} per CPU second")


def measure_loader(data: BlipDataModule, num_samples: int) -> None:
    iterator = iter(data.train_dataloader())
    next(iterator)  # start of the workers
    start = time.perf_counter()
    num_batches = max(1, num_samples // data.batch_size)
    for _ in range(num_batches):
        next(iterator)
    rate = num_batches * data.batch_size / (time.perf_counter() - start)
    print(f"{data.num_workers:>8} workers  {rate:>8.0f} per second")


if __name__ == "__main__":
    main()
