"""World -> shards: train, val_in and val_out, in the same record format as any real data set.

Implements the micro-world's COCO and NoCaps: captions, questions with answers, and the exact scene beside each image.
LAVIS has no counterpart: its data is downloaded.
"""

from __future__ import annotations

import io
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from blip2train.data.shards import ShardEntry, ShardWriter
from blip2train.errors import DataError
from blip2train.microworld.language import captions, questions
from blip2train.microworld.render import render
from blip2train.microworld.scene import Scene, WorldSpec, sample_scene
from blip2train.microworld.vocabulary import world_hash
from blip2train.run_dir import read_json, write_json

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]
"""Called with (images done, images in all)."""

MANIFEST = "microworld.json"
JPEG_QUALITY = 95
"""Without chroma subsampling: 3.9 kB and 0.06 ms per image, against 8.2 kB and 0.6 ms as PNG."""
SPLITS = {"train": ("in", 0), "val_in": ("in", 1_000_000_000), "val_out": ("out", 2_000_000_000)}
"""Name -> (domain, number of its first scene): validation scenes come from another range than training scenes."""


def build_world(
    spec: WorldSpec,
    out: str | Path,
    train_images: int = 5000,
    val_images: int = 200,
    *,
    samples_per_shard: int = 1000,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `out/train-*.tar`, `out/val_in-*.tar` and `out/val_out-*.tar`, or reuse them if they are there already.

    Args:
        spec: the world.
        out: folder of the shards and of their manifest `microworld.json`.
        train_images: images of the training split, none with a held-out pair.
        val_images: images of each validation split; `val_out` has a held-out pair in every image, and is left out in
            a world that holds nothing out.
        samples_per_shard: records per tar.
        progress: called with (images done, images in all).

    Returns:
        The manifest: world, counts per split, world hash and shards with their sha256.

    Raises:
        DataError: `out` holds another world.
    """
    out = Path(out)
    counts = {"train": train_images, "val_in": val_images, "val_out": val_images if spec.held_out else 0}
    identity = {
        "world": json.loads(json.dumps(asdict(spec))),
        "world_hash": world_hash(spec),
        "images": counts,
        "samples_per_shard": samples_per_shard,
    }
    finished = _finished(out, identity)
    if finished is not None:
        logger.info("%s holds this world already", out)
        return finished
    total, done = sum(counts.values()), 0
    entries: dict[str, list[ShardEntry]] = {}
    for split, count in counts.items():
        if not count:
            continue
        with ShardWriter(out, split, samples_per_shard) as writer:
            for record in split_records(spec, split, count):
                content = json.dumps(record["json"]).encode()
                writer.write(record["key"], record["image_bytes"], record["extension"], content)
                done += 1
                if progress is not None:
                    progress(done, total)
        entries[split] = writer.entries
    manifest = identity | {"shards": {split: [asdict(entry) for entry in found] for split, found in entries.items()}}
    write_json(out / MANIFEST, manifest)
    return manifest


def split_records(spec: WorldSpec, split: str, count: int) -> Iterator[dict[str, Any]]:
    """The first `count` records of a split, as `data.pack.pack_records` takes them."""
    domain, first = SPLITS[split]
    for index in range(count):
        scene = sample_scene(spec, domain, first + index)
        yield {
            "key": f"{split}_{index:06d}",
            "image_bytes": encode(scene, spec),
            "extension": "jpg",
            "json": to_record(scene, spec, image_id=first + index, domain=domain),
        }


def to_record(scene: Scene, spec: WorldSpec, *, image_id: int, domain: str) -> dict[str, Any]:
    """The JSON of one record; captions and questions follow from the scene's own seed."""
    rng = random.Random(scene.seed)
    return {
        "captions": captions(scene, rng, spec.captions),
        "image_id": image_id,
        "questions": [
            {
                "question_id": f"{image_id}-{item.kind}",
                "question": item.question,
                "answers": [item.answer],
                "kind": item.kind,
            }
            for item in questions(scene, rng)
        ],
        "scene": scene.to_json(),
        "domain": domain,
    }


def encode(scene: Scene, spec: WorldSpec) -> bytes:
    """The scene's image as JPEG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(render(scene, spec)).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _finished(out: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    path = out / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    names = [row["name"] for rows in manifest["shards"].values() for row in rows]
    if all(manifest.get(key) == value for key, value in identity.items()) and all((out / n).is_file() for n in names):
        return manifest
    raise DataError(
        "a folder that holds another micro-world", where=str(out), fix="choose another folder, or delete this one"
    )
