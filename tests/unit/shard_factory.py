"""Shards made with the standard library alone, so that reading is tested against another writer than our own."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def encode(pixels: np.ndarray, extension: str = "png") -> bytes:
    """uint8 (h, w, 3) -> encoded image."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension])
    return buffer.getvalue()


def noise(seed: int, height: int = 12, width: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_tar(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(
    folder: Path,
    sizes: Sequence[int],
    *,
    index: bool = True,
    broken: Mapping[int, bytes] | None = None,
    name: str = "r",
) -> list[Path]:
    """Shards of `sizes` records with keys r000000, r000001, ...; `broken` replaces the image of record number n."""
    paths, number = [], 0
    for place, size in enumerate(sizes):
        files: list[tuple[str, bytes]] = []
        for _ in range(size):
            key = f"{name}{number:06d}"
            image = (broken or {}).get(number, encode(noise(number)))
            fields = {"captions": [f"picture number {number}", f"image {number} again"], "image_id": number}
            files += [(f"{key}.png", image), (f"{key}.json", json.dumps(fields).encode())]
            number += 1
        paths.append(write_tar(folder / f"s-{place:03d}.tar", files))
    if index:
        rows = [{"name": path.name, "num_records": size} for path, size in zip(paths, sizes, strict=True)]
        (folder / "index.json").write_text(json.dumps({"shards": rows}))
    return paths


def plain(image: Tensor, generator: torch.Generator | None) -> Tensor:
    """A transform that keeps the pixels but shows in one of them what the generator gave."""
    marked = image.clone()
    if generator is not None:
        marked[0, 0, 0] = int(torch.randint(256, (), generator=generator))
    return marked
