"""Any folder of images, with a file of captions or with a text beside every image -> rows.

Implements the entry to the data path for a user's own pictures; LAVIS needs a dataset class, a builder and two yaml
files for that.

    images/a/1.jpg, ...  and  captions.jsonl | .csv | .tsv | .parquet     see `data/source/table.py`
    images/a/1.jpg  images/a/1.txt  images/a/1.json                       the txt is one caption, the JSON the record
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blip2train.data.source.base import Row, Skipped, existing_file, existing_folder, is_image, safe_key, sha256
from blip2train.data.source.merge import Merged
from blip2train.data.source.table import TABLE_SUFFIXES, Columns, read_table
from blip2train.errors import ConfigError

_TEXTS = ("json", "txt")


class FolderSource:
    """Images with a file of captions.

    Args:
        images: folder that the names in the file are relative to; the folder of `captions` is tried next.
        captions: JSONL, CSV, TSV or Parquet.
        image_column: where the file has it under another name.
        captions_column: likewise.
        ignored: folders below `images` that are no part of it: where the shards go.

    Raises:
        DataError: a file or folder is missing.
    """

    def __init__(
        self,
        images: str | Path,
        captions: str | Path,
        *,
        image_column: str | None = None,
        captions_column: str | None = None,
        ignored: Sequence[Path] = (),
    ) -> None:
        self.skipped = Skipped()
        self._images, self._captions = existing_folder(images), existing_file(captions)
        self._ignored = ignored
        self._columns = Columns(image_column, captions_column)
        self._merged = Merged(lambda skipped: read_table(self._captions, self._columns, skipped))

    def identity(self) -> dict[str, Any]:
        columns = {"image_column": self._columns.image, "captions_column": self._columns.captions}
        return {
            "kind": "folder",
            "images": str(self._images),
            "captions": str(self._captions),
            "sha256": sha256(self._captions),
            **{name: value for name, value in columns.items() if value is not None},
        }

    def count(self) -> int | None:
        return self._merged.count()

    def rows(self) -> Iterator[Row]:
        """In the order of the file; at its end the images that no line speaks of are counted."""
        self.skipped = self.skipped.fresh()
        roots = dict.fromkeys(os.path.abspath(folder) for folder in (self._images, self._captions.parent))  # noqa: PTH100
        used = array("Q")
        for name, fields in self._merged.entries(self.skipped):
            # strings: paths would take most of the time of a long list
            paths = [os.path.normpath(os.path.join(root, name)) for root in roots]  # noqa: PTH118
            used.extend(map(_hash, paths))
            yield Row(safe_key(os.path.splitext(name)[0]), name, fields, tuple(map(Path, paths)))  # noqa: PTH122
        self._count_unused(used)

    def notes(self) -> dict[str, Any]:
        return {}

    def _count_unused(self, used: array[int]) -> None:
        known = np.sort(np.frombuffer(used, dtype=np.uint64)) if used else np.zeros(0, np.uint64)
        for path in files_below(self._images, self._ignored):
            if path.absolute() == self._captions.absolute():
                continue
            value = np.uint64(_hash(os.path.abspath(path)))  # noqa: PTH100
            place = int(np.searchsorted(known, value))
            if place < len(known) and known[place] == value:
                continue
            cause = "image_without_caption" if is_image(path.name) else "not_an_image"
            self.skipped.add(cause, str(path.relative_to(self._images)))


class TextBesideSource:
    """Images with a text file of the same name beside each: `1.jpg` and `1.txt` or `1.json`.

    Args:
        images: the folder, searched to any depth.
        ignored: folders below it that are no part of it: where the shards go.

    Raises:
        DataError: it does not exist.
        ConfigError: no image in it has a text beside it.
    """

    def __init__(self, images: str | Path, *, ignored: Sequence[Path] = ()) -> None:
        self.skipped = Skipped()
        self._images, self._ignored = existing_folder(images), ignored
        if not any(row.texts for row in self._find(Skipped())):
            raise ConfigError(
                f"no captions for the images in {self._images}",
                where="annotations",
                fix=f"give annotations=FILE with one of {', '.join(TABLE_SUFFIXES)}, or lay a .txt beside every image",
            )

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path in files_below(self._images, self._ignored):
            digest.update(os.fsencode(f"{path.relative_to(self._images)} {path.stat().st_size}\n"))
        return {"kind": "text_beside", "images": str(self._images), "sha256": digest.hexdigest()}

    def count(self) -> int | None:
        return sum(1 for _ in self._find(Skipped()))

    def rows(self) -> Iterator[Row]:
        self.skipped = self.skipped.fresh()
        yield from self._find(self.skipped)

    def notes(self) -> dict[str, Any]:
        return {}

    def _find(self, skipped: Skipped) -> Iterator[Row]:
        for folder, names in _folders_below(self._images, self._ignored):
            yield from rows_beside(folder, names, self._images, skipped)


def rows_beside(folder: Path, names: list[str], root: Path, skipped: Skipped) -> Iterator[Row]:
    """The images among `names` with the texts beside them; files that belong to no image are counted."""
    images = [name for name in names if is_image(name)]
    stems = {Path(name).stem for name in images}
    known = set(names)
    for name in names:
        stem, kind = Path(name).stem, Path(name).suffix.lower().lstrip(".")
        relative = str((folder / name).relative_to(root))
        if name in images:
            texts = {kind: folder / f"{stem}.{kind}" for kind in _TEXTS if f"{stem}.{kind}" in known}
            if texts:
                yield Row(safe_key(str(Path(relative).with_suffix(""))), relative, {}, (folder / name,), texts)
            else:
                skipped.add("image_without_caption", relative)
        elif kind in _TEXTS and stem not in stems:
            skipped.add("caption_without_image", relative)
        elif kind not in _TEXTS:
            skipped.add("not_an_image", relative)


def find_captions(images: Path) -> Path | None:
    """The file of captions that lies in the folder under the usual name, if one does."""
    paths = (images / f"captions{suffix}" for suffix in TABLE_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def files_below(folder: Path, ignored: Sequence[Path] = ()) -> Iterator[Path]:
    """Every file to any depth, in an order that does not depend on the file system."""
    for parent, names in _folders_below(folder, ignored):
        yield from (parent / name for name in names)


def _folders_below(folder: Path, ignored: Sequence[Path]) -> Iterator[tuple[Path, list[str]]]:
    left_out = {path.absolute() for path in ignored}
    seen: set[tuple[int, int]] = set()
    # links are followed, as data often lies on another disk, but no folder is read twice: links may go in circles
    for parent, folders, names in os.walk(folder, followlinks=True):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if Path(parent, name).absolute() not in left_out)
        yield Path(parent), sorted(names)


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "big")
