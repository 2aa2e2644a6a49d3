"""Shards as img2dataset writes them, of noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capfilt_world import WORDS
from shard_factory import encode, noise, write_tar
from torch import Tensor

from blip2train.data.image_transform import decode_image


def random_image(number: int) -> Tensor:
    """Noise of a size that depends on the number: (3, h, w) uint8."""
    return decode_image(encode(noise(number, 40 + number, 50)))


def write_web_shards(folder: Path, sizes: Sequence[int], broken: Sequence[int] = (), name: str = "web") -> list[str]:
    """Shards as img2dataset writes them, a txt beside a JSON with `caption`; `broken` records hold no image."""
    paths, number = [], 0
    for place, size in enumerate(sizes):
        files: list[tuple[str, bytes]] = []
        for _ in range(size):
            image = b"no image" if number in broken else encode(noise(number, 20 + number % 7, 24), "jpg")
            caption = f"the {WORDS[5 + number % 20]} in the {WORDS[8 + number % 15]}"
            fields: dict[str, Any] = {"caption": caption, "url": f"https://x/{number}.jpg", "width": 24}
            key = f"{number:09d}"
            files += [(f"{key}.jpg", image), (f"{key}.json", json.dumps(fields).encode()),
                      (f"{key}.txt", caption.encode())]  # fmt: skip
            number += 1
        paths.append(str(write_tar(folder / f"{place:05d}.tar", files)))
    rows = [{"name": Path(path).name, "num_records": size} for path, size in zip(paths, sizes, strict=True)]
    (folder / "index.json").write_text(json.dumps({"shards": rows}))
    return paths
