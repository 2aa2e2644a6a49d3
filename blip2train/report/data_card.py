"""Shards -> the cards of a page about them: seeded records with a small picture and everything that is said of each.

Implements the gallery of `blip2train data view`. LAVIS has none: what its loaders yield is seen by nobody.
"""

from __future__ import annotations

import base64
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from blip2train.benchmark.thumbnail import thumbnail
from blip2train.data.drop import Drop
from blip2train.data.image_transform import decode_image
from blip2train.data.inspect_record import CheckSettings, inspect_record
from blip2train.data.inspect_shard import source_of
from blip2train.data.sample import read_text
from blip2train.data.shards import IMAGE_EXTENSIONS, RawRecord, Shard, ShardCache, ShardReader
from blip2train.errors import DataError

MAX_CHARACTERS = 400
_MAX_NOTES = 12


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption; `score` and `origin` are CapFilt's, where it has been there."""

    text: str
    score: float | None = None
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """One record: `picture` is a data URI, empty where there is none to show.

    `problems` are (kind, severity) as a check would find them, `notes` further fields of the JSON.
    """

    key: str
    shard: str
    source: str
    picture: str
    size: str
    captions: Sequence[Caption]
    questions: Sequence[tuple[str, str]]
    problems: Sequence[tuple[str, str]]
    notes: Sequence[tuple[str, str]]


def sample_cards(
    shards: Sequence[Shard],
    number: int,
    seed: int,
    settings: CheckSettings,
    *,
    cache: ShardCache | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[Card]:
    """Cards of `number` records, drawn from all shards without replacement, in the order of the shards.

    Args:
        shards: counted.
        number: of cards, or all records if there are fewer.
        seed: of the draw.
        settings: what counts as a problem.
        cache: holds copies of remote shards.
        progress: called after every card.
    """
    ends = list(accumulate(shard.num_records for shard in shards))
    total = ends[-1] if ends else 0
    chosen = sorted(random.Random(seed).sample(range(total), min(number, total)))
    reader = ShardReader(shards, cache, max_open=1)
    cards = []
    for done, place in enumerate(chosen, start=1):
        shard = bisect_right(ends, place)
        record = reader.record(shard, place - ends[shard] + shards[shard].num_records)
        cards.append(to_card(record, settings))
        if progress is not None:
            progress(done, len(chosen))
    reader.close()
    return cards


def to_card(record: RawRecord, settings: CheckSettings) -> Card:
    """Everything a person wants to see of one record, usable or not."""
    from blip2train.data.finding import KINDS

    facts = inspect_record(record, settings)
    text = read_text(record, "view")
    url = str(record["__url__"])
    size = f"{facts.size[0]} × {facts.size[1]}, {-(-facts.num_bytes // 1000)} kB" if facts.size else ""
    kinds = dict.fromkeys(kind for kind, _ in (*facts.defects, *facts.text_defects))
    return Card(
        key=str(record["__key__"]),
        shard=url.rsplit("/", 1)[-1],
        source=source_of(url),
        picture=_picture(record),
        size=size,
        captions=() if isinstance(text, Drop) else _captions(text.captions, text.extra),
        questions=()
        if isinstance(text, Drop)
        else [(shortened(row.question), shortened(", ".join(dict.fromkeys(row.answers)))) for row in text.questions],
        problems=[(kind.replace("_", " "), KINDS[kind].severity) for kind in kinds],
        notes=() if isinstance(text, Drop) else _notes(text.extra),
    )


def shortened(text: str) -> str:
    """At most `MAX_CHARACTERS`, and how many there were."""
    # a browser takes neither half surrogate pairs nor NUL
    clean = text.encode("utf-8", "replace").decode().replace("\0", "�")
    return clean if len(clean) <= MAX_CHARACTERS else f"{clean[:MAX_CHARACTERS]}… ({len(clean):,} characters)"


def _captions(captions: Sequence[str], extra: Any) -> list[Caption]:
    scores, origins = _beside(extra.get("caption_scores"), captions), _beside(extra.get("caption_origins"), captions)
    return [
        Caption(shortened(text), float(score) if isinstance(score, int | float) else None, str(origin or ""))
        for text, score, origin in zip(captions, scores, origins, strict=True)
    ]


def _beside(found: Any, captions: Sequence[str]) -> Sequence[Any]:
    return found if isinstance(found, list) and len(found) == len(captions) else [None] * len(captions)


def _notes(extra: Any) -> list[tuple[str, str]]:
    shown = ("caption_scores", "caption_origins", "capfilt")
    rows = [(str(name), value) for name, value in extra.items() if name not in shown]
    return [(name, shortened(str(value))[:120]) for name, value in rows if isinstance(value, str | int | float)][
        :_MAX_NOTES
    ]


def _picture(record: RawRecord) -> str:
    data = next((record[extension] for extension in IMAGE_EXTENSIONS if extension in record), None)
    if data is None:
        return ""
    try:
        small = thumbnail(decode_image(data), longest_side=224, quality=80)
    except DataError:
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(small).decode("ascii")
