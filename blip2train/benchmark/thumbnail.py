"""Small pictures of evaluated records, kept beside the predictions so that a report needs no shards.

Made before the encoder's transform, which squeezes a photograph into a small square. LAVIS keeps predictions only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from blip2train.batch import EvalItem
from blip2train.data.image_transform import Transform
from blip2train.data.sample import read_eval_items
from blip2train.distributed import gather_objects, rank, world_size

LONGEST_SIDE = 160


def read_with_pictures(
    urls: Sequence[str], transform: Transform, limit: int | None, pictures: dict[str, bytes]
) -> Iterator[EvalItem]:
    """Read this rank's share of the records, and put a small picture of each into `pictures` under its key."""
    latest = [b""]

    def keep_picture(image: Tensor, generator: torch.Generator | None) -> Tensor:
        latest[0] = thumbnail(image)
        return transform(image, generator)

    for item in read_eval_items(urls, keep_picture, limit, rank=rank(), world_size=world_size()):
        pictures[item.key] = latest[0]
        yield item


def gather_pictures(pictures: Mapping[str, bytes], shown: Collection[str]) -> dict[str, bytes]:
    """The pictures of the records in `shown`, from all ranks."""
    return dict(gather_objects([(key, data) for key, data in pictures.items() if key in shown]))


def thumbnail(image: Tensor, longest_side: int = LONGEST_SIDE, quality: int = 90) -> bytes:
    """JPEG of a uint8 (3, h, w) image, at most `longest_side` pixels on the long side and never enlarged."""
    assert image.dtype == torch.uint8
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    file = BytesIO()
    # full-resolution colour: chroma subsampling smears the small coloured shapes of synthetic images
    picture.save(file, format="JPEG", quality=quality, subsampling=0)
    return file.getvalue()
