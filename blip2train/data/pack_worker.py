"""Rows -> one shard and a report of it: the part of packing that runs in many processes at once.

Implements the image side of packing: the bytes are kept as they are unless they must shrink or change their format.
LAVIS trains from the files as downloaded. The result depends on the rows and the settings alone.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torchvision.io import encode_jpeg, encode_png
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from blip2train.data.image_file import MAX_PIXELS, ImageTooLargeError
from blip2train.data.image_transform import decode_image
from blip2train.data.shards import ShardEntry
from blip2train.data.source.base import Fields, Row, load
from blip2train.data.tar_shard import TarShard
from blip2train.errors import ConfigError, DataError

WORK_FOLDER = ".pack"
"""Below the folder of the shards: everything that is not finished."""

MAX_COUNTED_WORDS = 100
SIDE_BIN = 64

_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"GIF87a": "gif", b"GIF89a": "gif"}


@dataclass(frozen=True, slots=True)
class PackSettings:
    """How rows become shards; part of what a packed data set is.

    Args:
        samples_per_shard: rows per tar. A tar holds fewer records where rows were left out.
        prefix: start of every shard's name.
        resize_short_side: in pixels; images whose shorter side is longer are shrunk to it (bicubic, antialiased). None
            keeps every size.
        reencode: "jpeg" stores every image as JPEG. None keeps the file as it is; only what was shrunk is written
            again, PNG as PNG and everything else as JPEG.
        jpeg_quality: of the JPEGs written here, 1 to 100.
        validate_images: decode every image and leave out what does not decode; slower, but training then never meets
            it.
        max_pixels: width x height above which an image that is decoded is left out.
    """

    samples_per_shard: int = 1000
    prefix: str = "shard"
    resize_short_side: int | None = None
    reencode: Literal["jpeg"] | None = None
    jpeg_quality: int = 95
    validate_images: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        checks = {
            "samples_per_shard": (_is_from(1, self.samples_per_shard), "give 1 or more"),
            "prefix": (bool(self.prefix) and "/" not in str(self.prefix), "give the start of a file name"),
            "resize_short_side": (
                self.resize_short_side is None or _is_from(1, self.resize_short_side),
                "give pixels, or null to keep every size",
            ),
            "reencode": (self.reencode in (None, "jpeg"), "jpeg, or null to keep the files as they are"),
            "jpeg_quality": (_is_from(1, self.jpeg_quality) and self.jpeg_quality <= 100, "give 1 to 100"),
            "validate_images": (isinstance(self.validate_images, bool), "give true or false"),
            "max_pixels": (_is_from(1, self.max_pixels), "give width x height"),
        }
        for name, (fits, fix) in checks.items():
            if not fits:
                raise ConfigError(f"{name}={getattr(self, name)!r}", where="pack settings", fix=fix)


def _is_from(low: int, value: object) -> bool:
    return isinstance(value, int) and value >= low


@dataclass(frozen=True, slots=True)
class ShardTask:
    """The rows of shard `number`; `checksum` of their keys shows whether the source still yields the same ones."""

    number: int
    rows: Sequence[Row]
    checksum: int


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What became of a task; as JSON it is one line of the log of finished shards.

    Args:
        number: of the shard.
        checksum: of its task.
        num_rows: rows of the task: records and skipped ones.
        entry: of the index; None where every row was skipped and there is no tar.
        seconds: that it took one process.
        num_captions: over all records.
        num_questions: over all records.
        skipped: (cause, name) of every row left out.
        formats: images by extension.
        caption_words: captions by number of words, the last bin open.
        short_sides: images that were decoded, by shorter side in bins of `SIDE_BIN` pixels (their lower end).
    """

    number: int
    checksum: int
    num_rows: int
    entry: ShardEntry | None
    seconds: float
    num_captions: int = 0
    num_questions: int = 0
    skipped: Sequence[tuple[str, str]] = ()
    formats: Mapping[str, int] = field(default_factory=dict)
    caption_words: Mapping[int, int] = field(default_factory=dict)
    short_sides: Mapping[int, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> ShardReport:
        entry = None if row["entry"] is None else ShardEntry(**row["entry"])
        counts = {name: {int(key): n for key, n in row[name].items()} for name in ("caption_words", "short_sides")}
        return cls(**{**row, **counts, "entry": entry, "skipped": [(cause, name) for cause, name in row["skipped"]]})


def make_shard(task: ShardTask, folder: Path, settings: PackSettings, on_row: Callable[[int], None]) -> ShardReport:
    """Write one shard.

    Args:
        task: its rows.
        folder: where it goes; partial files are in its `WORK_FOLDER`.
        settings: how.
        on_row: called with the bytes written for each row; an error it raises ends the work without a trace.

    Raises:
        OSError: the disk is full or gone.
    """
    start = time.monotonic()
    captions = questions = 0
    skipped: list[tuple[str, str]] = []
    formats: Counter[str] = Counter()
    words: Counter[int] = Counter()
    sides: Counter[int] = Counter()
    name = f"{settings.prefix}-{task.number:06d}.tar"
    with TarShard(folder / name, folder / WORK_FOLDER / f"{name}.partial") as shard:
        for row in task.rows:
            record = _to_record(row, settings)
            if isinstance(record, str):
                skipped.append((record, row.name))
                on_row(0)
                continue
            shard.write(row.key, {record.extension: record.image, "json": record.content})
            captions += len(record.fields.get("captions", ()))
            questions += len(record.fields.get("questions", ()))
            formats[record.extension] += 1
            words.update(min(len(text.split()), MAX_COUNTED_WORDS) for text in record.fields.get("captions", ()))
            if record.short_side is not None:
                sides[record.short_side // SIDE_BIN * SIDE_BIN] += 1
            on_row(len(record.image) + len(record.content))
        entry = shard.finish() if shard.num_records else None
    return ShardReport(
        number=task.number,
        checksum=task.checksum,
        num_rows=len(task.rows),
        entry=entry,
        seconds=round(time.monotonic() - start, 3),
        num_captions=captions,
        num_questions=questions,
        skipped=skipped,
        formats=dict(formats),
        caption_words=dict(words),
        short_sides=dict(sides),
    )


@dataclass(frozen=True, slots=True)
class _Record:
    image: bytes
    extension: str
    content: bytes
    fields: Fields
    short_side: int | None


def _to_record(row: Row, settings: PackSettings) -> _Record | str:
    """What goes into the tar, or the cause why the row cannot be packed."""
    loaded = load(row)
    if isinstance(loaded, str):
        return loaded
    fields, data = loaded
    try:
        # str: dates and decimals of a Parquet file are texts in JSON
        content = json.dumps(fields, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return "bad_text"
    image = prepare_image(data, settings)
    return image if isinstance(image, str) else _Record(image[0], image[1], content, fields, image[2])


def prepare_image(data: bytes, settings: PackSettings) -> tuple[bytes, str, int | None] | str:
    """(encoded image, extension, shorter side if it was decoded), or the cause why it cannot be packed.

    What shards have no extension for (BMP, TIFF, AVIF, JPEG 2000) becomes JPEG. A file's EXIF orientation is applied
    when it is written again; a file that is kept keeps it, and training applies it.
    """
    extension = _extension(data)
    as_jpeg = extension is None or (settings.reencode == "jpeg" and extension != "jpg")
    if extension is not None and not as_jpeg and settings.resize_short_side is None and not settings.validate_images:
        return data, extension, None
    try:
        image = decode_image(data, settings.max_pixels)
    except ImageTooLargeError:
        return "image_too_large"
    except DataError:
        return "not_an_image" if extension is None else "corrupt_image"
    side = min(image.shape[-2:])
    limit = settings.resize_short_side
    if limit is not None and side > limit:
        image = F.resize(image, [limit], interpolation=InterpolationMode.BICUBIC, antialias=True)
        side = limit
    elif extension is not None and not as_jpeg:
        return data, extension, side
    if extension == "png" and not as_jpeg:
        return _to_bytes(encode_png(image)), "png", side
    return _to_bytes(encode_jpeg(image, quality=settings.jpeg_quality)), "jpg", side


def _to_bytes(encoded: Tensor) -> bytes:
    data: bytes = encoded.numpy().tobytes()
    return data


def _extension(data: bytes) -> str | None:
    """What the first bytes say the file is; names lie."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for start, extension in _SIGNATURES.items() if data.startswith(start)), None)
