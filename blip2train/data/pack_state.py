"""What a packing call has done so far, and what is left to say when it is done: state file and manifest.

Implements no part of the paper, and nothing in LAVIS: a call that was interrupted continues after its last whole shard,
a finished one is not repeated, and nothing is ever written over another data set.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blip2train.data.pack_source import Skipped
from blip2train.data.shards import ShardEntry
from blip2train.errors import DataError
from blip2train.run_dir import free_bytes, read_json, write_json

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
_STATE_NAME = ".pack_state.json"
_SPARE_BYTES = 64 << 20


@dataclass
class PackState:
    """What an interrupted call had finished; saved after every shard."""

    num_rows: int = 0
    num_captions: int = 0
    entries: list[ShardEntry] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)


def check_disk(out: Path, num_bytes: int) -> None:
    """DataError if less than `num_bytes` and some reserve are free where `out` is or will be."""
    needed = num_bytes + _SPARE_BYTES
    free = free_bytes(out)
    if free < needed:
        raise DataError(
            f"not enough disk space: about {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            where=str(out),
            fix="choose another folder, free space, or shrink the images (resize_short_side)",
        )


def finished_manifest(out: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of the same finished data set; DataError where another one, or an unknown one, lies."""
    path = out / MANIFEST_NAME
    if path.is_file():
        manifest = read_json(path)
        same = identity["source"] is not None and all(manifest.get(name) == value for name, value in identity.items())
        if same and all((out / row["name"]).is_file() for row in manifest["shards"]):
            return manifest
    elif (out / _STATE_NAME).is_file() or not any(out.glob("*.tar")):
        return None
    raise DataError(
        "a folder that holds another data set", where=str(out), fix="choose another folder, or delete this one"
    )


def read_state(out: Path, identity: Mapping[str, Any]) -> PackState:
    """What an interrupted call with this identity left; DataError if it had another one."""
    path = out / _STATE_NAME
    if not path.is_file():
        return PackState()
    saved = read_json(path)
    if not saved["shards"]:
        return PackState()
    if identity["source"] is None or any(saved.get(name) != value for name, value in identity.items()):
        raise DataError(
            "an interrupted call with another source or other settings left shards here",
            where=str(out),
            fix="repeat that call to finish it, choose another folder, or delete this one",
        )
    logger.info("continuing in %s after %d rows", out, saved["num_rows"])
    skipped = Skipped()
    skipped.counts.update(saved["skipped"])
    skipped.examples.update(saved["skipped_examples"])
    return PackState(saved["num_rows"], saved["num_captions"], [ShardEntry(**row) for row in saved["shards"]], skipped)


def finish(out: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest; from then on the data set counts as packed."""
    write_json(out / MANIFEST_NAME, manifest)
    (out / _STATE_NAME).unlink(missing_ok=True)


def save_state(out: Path, identity: Mapping[str, Any], state: PackState) -> None:
    """Remember the whole shards so far."""
    write_json(out / _STATE_NAME, {"num_rows": state.num_rows} | to_manifest(identity, state, state.skipped))


def to_manifest(identity: Mapping[str, Any], state: PackState, skipped: Skipped) -> dict[str, Any]:
    """What lies in the shards, where it came from, and what was left out."""
    digest = hashlib.sha256("".join(entry.sha256 for entry in state.entries).encode()).hexdigest()
    return {
        "format": 1,
        **identity,
        "num_records": sum(entry.num_records for entry in state.entries),
        "num_captions": state.num_captions,
        "num_bytes": sum(entry.num_bytes for entry in state.entries),
        "num_skipped": sum(skipped.counts.values()),
        "skipped": dict(skipped.counts),
        "skipped_examples": dict(skipped.examples),
        "sha256": digest,
        "shards": [asdict(entry) for entry in state.entries],
    }
