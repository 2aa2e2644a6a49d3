"""Flickr30k's own file of captions -> one row per image, without a split.

Official layout, from https://shannon.cs.illinois.edu/DenotationGraph/ (Flickr 30k, on request):

    results_20130124.token             1000092795.jpg#0<tab>Two young guys with shaggy hair look at their hands ...
    flickr30k-images/1000092795.jpg

The paper's 1,000 test images are Karpathy's split: `data/source/karpathy.py` reads dataset_flickr30k.json, and
`data/source/lavis.py` the lists flickr30k_train.json, _val and _test.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip2train.data.source.base import (
    Folders,
    Row,
    Skipped,
    existing_file,
    existing_folder,
    first_image_id,
    safe_key,
    sha256,
)
from blip2train.data.source.karpathy import FLICKR_FOLDERS
from blip2train.data.source.merge import Entry, Merged
from blip2train.errors import DataError


class Flickr30kTokenSource:
    """All of Flickr30k.

    Args:
        images: the folder `flickr30k-images`, or the one above it.
        captions: results_20130124.token.

    Raises:
        DataError: a file or folder is missing, or the first line is no caption.
    """

    def __init__(self, images: str | Path, captions: str | Path) -> None:
        self.skipped = Skipped()
        self._folders = Folders(existing_folder(images), FLICKR_FOLDERS)
        self._path = existing_file(captions)
        if not any(True for _ in self._entries(Skipped())):
            raise DataError(
                "no line of the form NAME.jpg#0<tab>caption",
                where=str(self._path),
                fix="give results_20130124.token, Karpathy's dataset_flickr30k.json, or a flickr30k_*.json of LAVIS",
            )
        self._merged = Merged(self._entries)

    def identity(self) -> dict[str, Any]:
        place = {"images": str(self._folders.root), "annotations": str(self._path)}
        return {"kind": "flickr30k", **place, "sha256": sha256(self._path)}

    def count(self) -> int | None:
        return self._merged.count()

    def rows(self) -> Iterator[Row]:
        """In the order of the file."""
        self.skipped = self.skipped.fresh()
        for name, fields in self._merged.entries(self.skipped):
            stem = Path(name).stem
            fields["image_id"] = first_image_id(stem)
            yield Row(safe_key(stem), name, fields, self._folders.candidates(name))

    def notes(self) -> dict[str, Any]:
        return {}

    def _entries(self, skipped: Skipped) -> Iterator[Entry]:
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    name, caption = line.decode("utf-8").strip().split("\t", 1)
                    name, _ = name.rsplit("#", 1)
                except UnicodeDecodeError:
                    skipped.add("bad_text", f"{self._path.name} line {number}")
                except ValueError:
                    skipped.add("bad_row", f"{self._path.name} line {number}")
                else:
                    yield name, {"captions": [caption]}
