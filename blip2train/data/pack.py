"""Folders with JSONL captions, COCO-style JSON, or any records -> shards with index and manifest.

Implements the entry to the data path for a user's own pictures. LAVIS needs a dataset class, a builder and two yaml
files for that. Nothing is left out in silence: whatever is not packed is counted by cause, and the first ones are
named.

    out/shard-000000.tar ...   complete shards only; the one being written has another name
    out/index.json             records, bytes and sha256 per shard
    out/manifest.json          source, settings, counts, what was skipped and why
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torchvision.io import encode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from blip2train.data.image_transform import decode_image
from blip2train.data.pack_source import Fields, Skipped, locate, read_coco, read_jsonl, report_unused
from blip2train.data.pack_state import (
    MANIFEST_NAME,
    PackState,
    check_disk,
    finish,
    finished_manifest,
    read_state,
    save_state,
    to_manifest,
)
from blip2train.data.shards import ShardWriter
from blip2train.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]
"""Called with (rows done, rows in all or None), both growing."""

SkipCause = Literal["duplicate_key", "missing_image", "no_caption", "not_an_image", "corrupt_image", "empty_file"]

_TAR_BYTES_PER_RECORD = 3 * 1024
_JPEG_QUALITY = 95
_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"GIF87a": "gif", b"GIF89a": "gif"}


@dataclass(frozen=True, slots=True)
class PackSettings:
    """How records become shards.

    Args:
        samples_per_shard: records per tar.
        prefix: start of every shard's name.
        resize_short_side: in pixels; larger images are shrunk to it and stored as JPEG. None keeps the bytes as they
            are.
        validate_images: decode every image and leave out what does not decode; slower, but training then never meets
            it.
    """

    samples_per_shard: int = 1000
    prefix: str = "shard"
    resize_short_side: int | None = None
    validate_images: bool = False

    def __post_init__(self) -> None:
        if self.resize_short_side is not None and self.resize_short_side < 1:
            raise ConfigError(
                f"resize_short_side={self.resize_short_side}",
                where="pack",
                fix="give pixels, or null to keep the images",
            )


@dataclass(frozen=True, slots=True)
class _Row:
    """One record to be; its image is given, or lies at `path` (None: not found) and is read when its turn comes."""

    key: str
    name: str
    fields: Mapping[str, Any]
    path: Path | None = None
    image: bytes = b""
    extension: str = ""


def pack_records(
    records: Iterable[Mapping[str, Any]],
    out: str | Path,
    samples_per_shard: int = 1000,
    *,
    prefix: str = "shard",
    source: Mapping[str, Any] | None = None,
    total: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack records whose images are in memory.

    Args:
        records: each with "key", "image_bytes", "extension" and "json" (a mapping, see `data/sample.py`).
        out: folder of the shards.
        samples_per_shard: records per tar.
        prefix: start of every shard's name.
        source: JSON-able description that identifies the records. With it, an interrupted call is continued and a
            finished one is not repeated; without it, `out` must not hold a data set.
        total: number of records, for `progress`.
        progress: called after every record.

    Returns:
        The manifest.

    Raises:
        DataError: `out` holds another data set, the disk is full, or there are no records.
    """
    rows = (
        _Row(
            safe_key(str(record["key"])),
            str(record["key"]),
            record["json"],
            None,
            record["image_bytes"],
            record["extension"],
        )
        for record in records
    )
    return _pack(rows, Path(out), PackSettings(samples_per_shard, prefix), source, Skipped(), total, progress)


def pack_folder(
    images: str | Path,
    captions: str | Path,
    out: str | Path,
    *,
    samples_per_shard: int = 1000,
    prefix: str = "shard",
    resize_short_side: int | None = None,
    validate_images: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack a folder of images with a JSONL file of captions.

    A line is `{"image" or "file_name": path, "caption": "..." or "captions": [...]}` with optional `image_id`,
    `questions` and anything else, which is kept. Lines of the same image are merged. `coco_id` is read as `image_id`,
    and `qa: [{question, answer_scores}]` as questions.

    Args:
        images: folder that the paths are relative to; the folder of `captions` is tried next.
        captions: the JSONL file.
        out: folder of the shards.
        samples_per_shard: see `PackSettings`, also for the next three.
        prefix: start of every shard's name.
        resize_short_side: in pixels, or None.
        validate_images: decode every image first.
        progress: called after every image.

    Returns:
        The manifest.

    Raises:
        DataError: a file or folder is missing, the disk is too small, `out` holds another data set, or nothing was
        packed.
    """
    images, captions, out = _existing(images), _existing(captions), Path(out)
    settings = PackSettings(samples_per_shard, prefix, resize_short_side, validate_images)
    skipped = Skipped()
    rows = _rows(read_jsonl(captions, skipped), (images, captions.parent))
    report_unused(images, {row.path for row in rows if row.path}, (captions, out), skipped)
    source = {"kind": "folder", "images": str(images), "captions": str(captions), "sha256": _sha256(captions)}
    return _pack(rows, out, settings, source, skipped, len(rows), progress)


def pack_coco(
    images: str | Path,
    annotations: str | Path,
    out: str | Path,
    *,
    samples_per_shard: int = 1000,
    prefix: str = "shard",
    resize_short_side: int | None = None,
    validate_images: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack COCO-style captions: one JSON with `images` (id, file_name) and `annotations` (image_id, caption).

    Args:
        images: folder of the files.
        annotations: the JSON file, such as `captions_train2017.json`.
        out: folder of the shards.
        samples_per_shard: see `PackSettings`, also for the next three.
        prefix: start of every shard's name.
        resize_short_side: in pixels, or None.
        validate_images: decode every image first.
        progress: called after every image.

    Returns:
        The manifest.

    Raises:
        DataError: as `pack_folder`, or the JSON lacks a field.
    """
    images, annotations = _existing(images), _existing(annotations)
    settings = PackSettings(samples_per_shard, prefix, resize_short_side, validate_images)
    skipped = Skipped()
    rows = _rows(read_coco(annotations, skipped), (images,))
    source = {"kind": "coco", "images": str(images), "annotations": str(annotations), "sha256": _sha256(annotations)}
    return _pack(rows, Path(out), settings, source, skipped, len(rows), progress)


def safe_key(name: str) -> str:
    """A record key from a path or name: no dots (they end a key in a tar), slashes kept."""
    return re.sub(r"[^\w/-]", "_", name).strip("/_") or "_".join(str(byte) for byte in name.encode())


def _pack(
    rows: Iterable[_Row],
    out: Path,
    settings: PackSettings,
    source: Mapping[str, Any] | None,
    skipped: Skipped,
    total: int | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write the rows; `skipped` is what the source reader left out."""
    identity = {"source": source, "settings": asdict(settings)}
    manifest = finished_manifest(out, identity)
    if manifest is not None:
        logger.info("%s holds this data set already", out)
        return manifest
    state = read_state(out, identity)
    if isinstance(rows, Sequence):
        check_disk(out, sum(_estimated_bytes(row, settings) for row in rows[state.num_rows :]))
    save_state(out, identity, state)
    try:
        _write_rows(rows, out, settings, identity, state, total, progress)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(
            f"the disk is full after {state.num_rows} rows",
            where=str(out),
            fix="free space and repeat the command: it continues",
        ) from error
    manifest = to_manifest(identity, state, skipped.merged(state.skipped))
    if not state.entries:
        raise DataError(
            f"nothing was packed; skipped: {manifest['skipped'] or 'nothing, there were no records'}",
            where=f"{source}",
            fix="check that the paths in the captions match the images; the first names are "
            f"{list(manifest['skipped_examples'].values())[:1]}",
        )
    if manifest["num_skipped"]:
        logger.warning("%s: left out %s; first names in %s", out, manifest["skipped"], MANIFEST_NAME)
    finish(out, manifest)
    return manifest


def _write_rows(
    rows: Iterable[_Row],
    out: Path,
    settings: PackSettings,
    identity: Mapping[str, Any],
    state: PackState,
    total: int | None,
    progress: Progress | None,
) -> None:
    seen: set[str] = set()
    num_finished = state.num_rows
    with ShardWriter(out, settings.prefix, settings.samples_per_shard, state.entries) as writer:
        for index, row in enumerate(rows):
            is_new = row.key not in seen
            seen.add(row.key)
            if index < num_finished:
                continue
            image = _to_image(row, settings) if is_new else "duplicate_key"
            state.num_rows = index + 1
            if isinstance(image, str):
                state.skipped.add(image, row.name)
            else:
                state.num_captions += len(row.fields.get("captions", ()))
                content = json.dumps(row.fields, ensure_ascii=False).encode()
                if writer.write(row.key, *image, content):
                    state.entries = list(writer.entries)
                    save_state(out, identity, state)
            if progress is not None:
                progress(index + 1, total)
    state.entries = list(writer.entries)


def _to_image(row: _Row, settings: PackSettings) -> tuple[bytes, str] | SkipCause:
    """(encoded image, extension), or why the row cannot be packed."""
    if not row.fields.get("captions") and not row.fields.get("questions"):
        return "no_caption"
    if row.image:
        return row.image, row.extension
    if row.path is None:
        return "missing_image"
    data = row.path.read_bytes()
    if not data:
        return "empty_file"
    extension = _extension(data)
    if extension is None:
        return "not_an_image"
    if settings.resize_short_side is None and not settings.validate_images:
        return data, extension
    try:
        image = decode_image(data)
    except DataError:
        return "corrupt_image"
    side = settings.resize_short_side
    if side is None or min(image.shape[-2:]) <= side:
        return data, extension
    smaller = F.resize(image, [side], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return encode_jpeg(smaller, quality=_JPEG_QUALITY).numpy().tobytes(), "jpg"


def _extension(data: bytes) -> str | None:
    """What the first bytes say the file is; names lie."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for start, extension in _SIGNATURES.items() if data.startswith(start)), None)


def _rows(entries: Mapping[str, Fields], folders: Sequence[Path]) -> list[_Row]:
    return [
        _Row(safe_key(str(Path(name).with_suffix(""))), name, fields, locate(name, folders))
        for name, fields in entries.items()
    ]


def _estimated_bytes(row: _Row, settings: PackSettings) -> int:
    if row.path is None:
        return 0
    size = row.path.stat().st_size
    if settings.resize_short_side is not None:
        size = min(size, 2 * settings.resize_short_side**2)  # a byte per pixel at twice the short side
    return size + _TAR_BYTES_PER_RECORD


def _existing(path: str | Path) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise DataError(f"no file or folder {found}", where=f"working folder {Path.cwd()}", fix="check the path")
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
