"""How fast `blip2train data pack` is on this machine.

    python scripts/benchmark/pack.py PHOTOS --images 5000 --workers 1 2

Enlarges the photographs of a folder to about 40 KB each, copies them until there are enough, and packs them: as they
are, checked (the default of the verb), and shrunk, in turns; the best of the turns counts. Two processes pay about two
seconds for their start. Writes results/pack.json beside this script.
"""

import argparse
import io
import json
import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from blip2train.data.pack import pack
from blip2train.data.pack_worker import PackSettings
from blip2train.data.source.folder import FolderSource

VARIANTS = {
    "as they are": PackSettings(),
    "validated": PackSettings(validate_images=True),
    "shrunk to 256": PackSettings(resize_short_side=256, validate_images=True),
}
LONG_SIDE = 560
QUALITY = 88


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of JPEGs")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        images = Path(folder) / "images"
        num_bytes = make_images(arguments.photos, images, arguments.images)
        kilobytes = num_bytes / arguments.images / 1000
        print(f"{arguments.images} images of {kilobytes:.1f} KB")
        turns = [
            measure(images, Path(folder) / "out", name, workers)
            for _ in range(arguments.turns)
            for name in VARIANTS
            for workers in arguments.workers
        ]
        rows = [
            best(turns, name, workers, arguments.images, num_bytes)
            for name in VARIANTS
            for workers in arguments.workers
        ]
    machine = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "processor": platform.machine()}
    result = {"images": arguments.images, "kilobytes_per_image": round(kilobytes, 1), "machine": machine, "rows": rows}
    (Path(__file__).parent / "results" / "pack.json").write_text(json.dumps(result, indent=2) + "\n")


def make_images(photos: Path, folder: Path, count: int) -> int:
    """Files of about 40 KB, with captions beside them; returns their bytes."""
    folder.mkdir()
    encoded = [enlarge(path) for path in sorted(photos.rglob("*.jpg"))]
    with (folder / "captions.jsonl").open("w") as captions:
        for number in range(count):
            name = f"{number:06d}.jpg"
            (folder / name).write_bytes(encoded[number % len(encoded)])
            captions.write(json.dumps({"image": name, "caption": f"photograph number {number}"}) + "\n")
    return sum(len(encoded[number % len(encoded)]) for number in range(count))


def enlarge(path: Path) -> bytes:
    image = Image.open(path).convert("RGB")
    scale = LONG_SIDE / max(image.size)
    buffer = io.BytesIO()
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


@dataclass(frozen=True)
class Turn:
    """Seconds of the clock, and of the processor, of one call; the latter only where it is one process."""

    name: str
    workers: int
    wall: float
    cpu: float


def measure(images: Path, out: Path, name: str, workers: int) -> Turn:
    source = FolderSource(images, images / "captions.jsonl")
    wall, cpu = time.perf_counter(), time.process_time()
    pack(source, out, VARIANTS[name], workers=workers)
    turn = Turn(name, workers, time.perf_counter() - wall, time.process_time() - cpu)
    shutil.rmtree(out)
    return turn


def best(turns: list[Turn], name: str, workers: int, num_images: int, num_bytes: int) -> dict[str, object]:
    own = [turn for turn in turns if (turn.name, turn.workers) == (name, workers)]
    wall, cpu = min(turn.wall for turn in own), min(turn.cpu for turn in own)
    row: dict[str, object] = {
        "variant": name,
        "workers": workers,
        "images_per_second": round(num_images / wall),
        "megabytes_per_second": round(num_bytes / wall / 1e6, 1),
    }
    if workers == 1:
        row["images_per_cpu_second"] = round(num_images / cpu)
    print(row)
    return row


if __name__ == "__main__":
    main()
