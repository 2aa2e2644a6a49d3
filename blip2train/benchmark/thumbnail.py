"""Small pictures of evaluated records, kept beside the predictions so that a report needs no shards.

Made from the transformed image, so the report shows what the model saw. LAVIS keeps predictions only.
"""

from __future__ import annotations

from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

LONGEST_SIDE = 160


def thumbnail(image: Tensor) -> bytes:
    """JPEG of a uint8 (3, h, w) image, at most 160 pixels on the long side and never enlarged."""
    assert image.dtype == torch.uint8
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    file = BytesIO()
    # full-resolution colour: chroma subsampling smears the small coloured shapes of synthetic images
    picture.save(file, format="JPEG", quality=90, subsampling=0)
    return file.getvalue()
