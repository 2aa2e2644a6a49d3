"""Which wrong image a record is shown in the shuffled control: the same score with another picture.

Not in the paper, which has no such control; a model that ignores the picture scores the same with and without it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def other_image(image_ids: Sequence[int], seed: int = 0) -> list[int]:
    """For every row, a row that shows a different image.

    The distinct images are put on one random cycle and each hands its picture to the next, so every picture is used
    once as a wrong one. Rows that share an image get the same wrong one.

    Returns:
        Row numbers; the row itself where there is only one image in all.
    """
    first_row: dict[int, int] = {}
    for row, image_id in enumerate(image_ids):
        first_row.setdefault(image_id, row)
    cycle = list(first_row)
    random.Random(seed).shuffle(cycle)
    following = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return [first_row[following[image_id]] for image_id in image_ids]
