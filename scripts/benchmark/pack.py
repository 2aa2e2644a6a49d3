"""How fast `blip2train data pack` is on this machine.

    python scripts/benchmark/pack.py PHOTOS --images 5000 --workers 1 2

Enlarges the photographs of a folder to about 40 KB each, copies them until there are enough, and packs them: as they
are, checked (the default of the verb), and shrunk. Writes images and megabytes of input per second to results/pack.json
beside this script.
"""

import argparse
import io
import json
import os
import platform
import shutil
import tempfile
import time
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
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        images = Path(folder) / "images"
        num_bytes = make_images(arguments.photos, images, arguments.images)
        kilobytes = num_bytes / arguments.images / 1000
        print(f"{arguments.images} images of {kilobytes:.1f} KB")
        rows = [
            measure(images, Path(folder) / "out", name, settings, workers, num_bytes)
            for name, settings in VARIANTS.items()
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


def measure(
    images: Path, out: Path, name: str, settings: PackSettings, workers: int, num_bytes: int
) -> dict[str, object]:
    source = FolderSource(images, images / "captions.jsonl")
    start = time.perf_counter()
    manifest = pack(source, out, settings, workers=workers)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    rate = manifest["num_records"] / seconds
    print(f"{name:>16}  workers={workers}  {rate:>7.0f} images/s  {num_bytes / seconds / 1e6:>6.1f} MB/s")
    return {
        "variant": name,
        "workers": workers,
        "images_per_second": round(rate),
        "megabytes_per_second": round(num_bytes / seconds / 1e6, 1),
        "process_seconds": manifest["made"]["process_seconds"],
    }


if __name__ == "__main__":
    main()
