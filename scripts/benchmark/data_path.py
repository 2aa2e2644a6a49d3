"""Images per CPU second on one core, from encoded bytes to a batch: ours against bare decoding and two peers.

    bash scripts/parity/lavis_environment.sh /tmp/lavis
    python scripts/benchmark/data_path.py PHOTOS --lavis-python /tmp/lavis/bin/python --out FILE.json

PHOTOS holds `captions.jsonl` and the JPEG files it names. Contenders take turns (A B C D, A B C D, ...), each with one
thread. Ours is the whole way of training: tar, JSON, caption, decode, crop, flip, tokens, batch. The peers get bytes
from memory and no text: Pillow, their own training transform, and stacking; LAVIS's runs in its own environment.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from blip2train.batch import ImageSpec
from blip2train.data.collate import Stage1Collator
from blip2train.data.datamodule import BlipDataModule
from blip2train.data.image_transform import TrainTransform
from blip2train.data.mixture import Dataset
from blip2train.data.pack import pack_records
from blip2train.data.tokenizer import QFormerTokenizer

BATCH = 64
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

LAVIS_WORKER = """
import importlib.util, io, sys, time, types, torch
from pathlib import Path
from PIL import Image
root = Path(importlib.util.find_spec("lavis").origin).parent
for name in ("lavis", "lavis.processors"):  # their __init__ imports every processor and model there is
    package = types.ModuleType(name)
    package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    sys.modules[name] = package
augment = types.ModuleType("lavis.processors.randaugment")  # needs OpenCV; BLIP-2 does not use it
augment.RandomAugment = None
sys.modules["lavis.processors.randaugment"] = augment
from lavis.processors.base_processor import BaseProcessor
sys.modules["lavis.processors"].BaseProcessor = BaseProcessor
from lavis.processors.blip_processors import Blip2ImageTrainProcessor
torch.set_num_threads(1)
images = [path.read_bytes() for path in sorted(Path(sys.argv[1]).glob("*.jpg"))]
process = Blip2ImageTrainProcessor(image_size=int(sys.argv[2]))
for line in sys.stdin:
    start, batch = time.process_time(), []
    for index in range(int(line)):
        batch.append(process(Image.open(io.BytesIO(images[index % len(images)])).convert("RGB")))
        if len(batch) == 64:
            torch.stack(batch)
            batch = []
    print(time.process_time() - start, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument(
        "--vocabulary", default="bert-base-uncased", help="folder or hub name of the Q-Former's tokenizer"
    )
    parser.add_argument("--lavis-python", type=Path, help="python of an environment that holds LAVIS; left out without")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 500], help="long sides to test with, in pixels")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(side, arguments) for side in arguments.sides]
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


def measure(side: int, arguments: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.loads(line) for line in (arguments.photos / "captions.jsonl").read_text().splitlines()]
        images = [with_long_side((arguments.photos / row["image"]).read_bytes(), side) for row in rows]
        for index, image in enumerate(images):
            (folder / f"{index:06d}.jpg").write_bytes(image)
        contenders = {
            "bare decode": lambda number: decode(images, number),
            "bare decode, Pillow": lambda number: decode_with_pillow(images, number),
            "ours": our_loader(rows, images, folder, arguments.size, QFormerTokenizer.load(arguments.vocabulary)),
            "open_clip": open_clip_transform(images, arguments.size),
        }
        if arguments.lavis_python:
            contenders["LAVIS"] = lavis_worker(arguments.lavis_python, folder, arguments.size)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(arguments.rounds + 1):
            for contender, run in contenders.items():
                taken = run(arguments.samples)
                if turn:  # the first one warms caches and files up
                    seconds[contender].append(taken)
    rates = {
        contender: {
            "median": arguments.samples / statistics.median(taken),
            "lowest": arguments.samples / max(taken),
            "highest": arguments.samples / min(taken),
        }
        for contender, taken in seconds.items()
    }
    mean_bytes = sum(map(len, images)) / len(images)
    print(f"long side {side} px, {mean_bytes / 1000:.1f} KB per image, images per CPU second (share of bare decode)")
    for contender, rate in rates.items():
        share = rate["median"] / rates["bare decode"]["median"]
        print(f"  {contender:>20}  {rate['median']:>6.0f}  [{rate['lowest']:.0f}, {rate['highest']:.0f}]  {share:.2f}")
    return {"long_side": side, "mean_bytes": mean_bytes, "samples": arguments.samples, "per_cpu_second": rates}


def with_long_side(data: bytes, side: int) -> bytes:
    """The same bytes where the size is right; else resized and encoded again."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if max(image.size) == side:
        return data
    scale = side / max(image.size)
    buffer = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=90
    )
    return buffer.getvalue()


def decode(images: Sequence[bytes], number: int) -> float:
    start = time.process_time()
    for index in range(number):
        data = torch.frombuffer(bytearray(images[index % len(images)]), dtype=torch.uint8)
        decode_jpeg(data, mode=ImageReadMode.RGB)
    return time.process_time() - start


def decode_with_pillow(images: Sequence[bytes], number: int) -> float:
    start = time.process_time()
    for index in range(number):
        Image.open(io.BytesIO(images[index % len(images)])).convert("RGB")
    return time.process_time() - start


def our_loader(
    rows: Sequence[dict[str, object]], images: Sequence[bytes], folder: Path, size: int, tokenizer: QFormerTokenizer
) -> Callable[[int], float]:
    records = (
        {"key": f"{index:06d}", "image_bytes": image, "extension": "jpg", "json": {"captions": row["captions"]}}
        for index, (row, image) in enumerate(zip(rows, images, strict=True))
    )
    pack_records(records, folder / "shards", samples_per_shard=50)
    spec = ImageSpec(size, CLIP_MEAN, CLIP_STD)
    dataset = Dataset("photos", str(folder / "shards"), TrainTransform(spec))
    data = BlipDataModule({"photos": dataset}, Stage1Collator(tokenizer), BATCH)
    batches = iter(data.train_dataloader())

    def run(number: int) -> float:
        start = time.process_time()
        for _ in islice(batches, number // BATCH):
            pass
        return time.process_time() - start

    return run


def open_clip_transform(images: Sequence[bytes], size: int) -> Callable[[int], float]:
    from open_clip import image_transform

    transform = image_transform(size, is_train=True, mean=CLIP_MEAN, std=CLIP_STD)

    def run(number: int) -> float:
        start = time.process_time()
        batch = []
        for index in range(number):
            batch.append(transform(Image.open(io.BytesIO(images[index % len(images)]))))
            if len(batch) == BATCH:
                torch.stack(batch)
                batch = []
        return time.process_time() - start

    return run


def lavis_worker(python: Path, folder: Path, size: int) -> Callable[[int], float]:
    worker = subprocess.Popen(
        [str(python), "-W", "ignore", "-c", LAVIS_WORKER, str(folder), str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdin and worker.stdout
    ask, answer = worker.stdin, worker.stdout

    def run(number: int) -> float:
        ask.write(f"{number}\n")
        ask.flush()
        return float(answer.readline())

    return run


def machine() -> dict[str, object]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "unknown",
    )
    return {"cpu": cpu, "torch": torch.__version__, "python": sys.version.split()[0]}


if __name__ == "__main__":
    main()
