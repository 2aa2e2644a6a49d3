"""A checkpoint folder -> what is wrong with it: every file by size and SHA-256, the list of them by its own checksum.

Not in the paper. LAVIS and plain Lightning find a torn file out when reading it fails, and a flipped bit never.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from blip2train.run_dir import write_json

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
TRAINER_STATE = "trainer.ckpt"
METADATA = "metadata.json"
FILES, CHECKSUM = "files", "checksum"


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write metadata.json: `facts`, size and SHA-256 of every file in the folder, and a checksum of all that.

    Every file is on the disk, and not only in its cache, when this returns.

    Raises:
        OSError: a file cannot be read or written.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != METADATA):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    plain = {key: value for key, value in facts.items() if key != CHECKSUM}  # of a checkpoint that is written anew
    sealed = {**plain, FILES: files}
    write_json(folder / METADATA, sealed | {CHECKSUM: _checksum(sealed)})
    sync(folder / METADATA)
    sync(folder)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk; a rename before that could survive a power cut without its bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a network filesystem that cannot, for folders
            raise
    finally:
        os.close(handle)


def problems(folder: Path, files: Sequence[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint, one line each; empty for a good one.

    A checkpoint of before there were checksums is read as far as its formats have checks of their own.

    Args:
        folder: of the checkpoint.
        files: names of those that are needed; None checks all that the metadata lists.
    """
    try:
        text = (folder / METADATA).read_text(encoding="utf-8")
    except FileNotFoundError:
        return [f"{METADATA} is missing"]
    except (OSError, ValueError) as error:
        return [f"{METADATA} cannot be read ({error})"]
    try:
        facts = json.loads(text)
        sealed = FILES in facts or CHECKSUM in facts
        whole = facts.get(CHECKSUM) == _checksum({key: value for key, value in facts.items() if key != CHECKSUM})
    except (ValueError, TypeError, AttributeError):
        return [f"{METADATA} is damaged: not a JSON object"]
    if not sealed:
        return _problems_without_checksums(folder, files)
    if not whole:
        return [f"{METADATA} is damaged: its checksum does not fit"]
    found = (_differs(folder, name, facts[FILES].get(name)) for name in (facts[FILES] if files is None else files))
    return [line for line in found if line]


def _differs(folder: Path, name: str, written: dict[str, Any] | None) -> str | None:
    if written is None:
        return f"{name} was not written"
    try:
        size = (folder / name).stat().st_size
        if size != written["bytes"]:
            return f"{name} has {size} bytes, {written['bytes']} were written"
        return None if _sha256(folder / name) == written["sha256"] else f"{name} is damaged: its SHA-256 does not fit"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error})"


def _problems_without_checksums(folder: Path, files: Sequence[str] | None) -> list[str]:
    log.warning("%s was written without checksums: a flipped bit in it would not be noticed", folder)
    optional = [TRAINER_STATE] if (folder / TRAINER_STATE).is_file() else []
    found = (_unreadable(folder, name) for name in (files if files is not None else [WEIGHTS, *optional]))
    return [line for line in found if line]


def _unreadable(folder: Path, name: str) -> str | None:
    """What the file's own format says: safetensors knows its length, a zip archive the CRC of each part."""
    path = folder / name
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return None
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            return f"{name} is damaged in {damaged}" if damaged else None
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, SafetensorError, zipfile.BadZipFile) as error:
        return f"{name} is not readable to its end ({error})"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(facts: Mapping[str, Any]) -> str:
    """Of the content: two texts of the same facts have the same one."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
