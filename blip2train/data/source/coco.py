"""COCO captions, and everything else in COCO's format (NoCaps) -> one row per image.

Official layout, from https://cocodataset.org/#download ("2014 Train/Val annotations", "2017 Train/Val annotations",
images as zips) and https://nocaps.org/download:

    annotations/captions_train2017.json   {"images": [{"id", "file_name", "coco_url", "license", ...}],
                                           "annotations": [{"image_id", "id", "caption"}], "info", "licenses"}
    train2014/COCO_train2014_000000000009.jpg   val2014/   train2017/000000000009.jpg   val2017/
    nocaps_val_4500_captions.json         images also with "open_images_id" and "domain" (in-, near-, out-domain)
    nocaps_test_image_info.json           no annotations: the test captions are private

`image_id` is COCO's or NoCaps' own, which their evaluation servers ask for. A file of 2014 finds the images of 2017,
which are the same under shorter names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip2train.data.source.base import Fields, Folders, Row, Skipped, existing_file, existing_folder, sha256
from blip2train.data.source.json_file import load_json, opens_with, wrong_file
from blip2train.errors import DataError

COCO_FOLDERS = (
    *("train2014", "val2014", "train2017", "val2017", "test2014", "test2015", "test2017", "images"),
    *("images/train2014", "images/val2014", "images/train2017", "images/val2017", "images/test2014"),
    *("images/test2015", "images/test2017"),
)
NOCAPS_FOLDERS = ("val", "test", "validation", "images", "images/val", "images/test", "images/validation")

_EXPECTED = (
    "a file with `images` (id, file_name) and `annotations` (image_id, caption), such as captions_train2017.json"
)


class CocoSource:
    """Captions in COCO's format.

    Args:
        images: folder of the files, or the one above `train2014`, `val2017` and so on.
        annotations: the JSON.
        kind: what the manifest calls it.
        subfolders: of `images`, where files may lie.

    Raises:
        DataError: a file or folder is missing, or the JSON is another one.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        *,
        kind: str = "coco",
        subfolders: tuple[str, ...] = COCO_FOLDERS,
    ) -> None:
        self.skipped = Skipped()
        self._folders = Folders(existing_folder(images), subfolders)
        self._path, self._kind = existing_file(annotations), kind
        if opens_with(self._path) != "{":
            raise wrong_file(self._path, _EXPECTED)
        content = load_json(self._path)
        if not isinstance(content.get("images"), list) or "questions" in content:
            raise wrong_file(self._path, _EXPECTED)
        self._images: list[dict[str, Any]] = content["images"]
        self._annotations: list[dict[str, Any]] = content.get("annotations") or []

    def identity(self) -> dict[str, Any]:
        place = {"images": str(self._folders.root), "annotations": str(self._path)}
        return {"kind": self._kind, **place, "sha256": sha256(self._path)}

    def count(self) -> int | None:
        return len(self._images)

    def rows(self) -> Iterator[Row]:
        """In the order of `images`; captions of no image are counted."""
        self.skipped = self.skipped.fresh()
        captions = self._captions()
        for image in self._images:
            name = str(image["file_name"])
            fields: Fields = {"captions": captions[image["id"]], "image_id": image["id"], **_extra(image)}
            paths = coco_candidates(self._folders, name)
            yield Row(self._folders.key(name), name, fields, paths, needs_text=bool(self._annotations))

    def notes(self) -> dict[str, Any]:
        return {}

    def _captions(self) -> dict[Any, list[str]]:
        try:
            captions: dict[Any, list[str]] = {image["id"]: [] for image in self._images if image["file_name"]}
            for row in self._annotations:
                text = row["caption"]
                if row["image_id"] not in captions:
                    self.skipped.add("caption_without_image", f"image_id {row['image_id']}: {text}")
                elif not isinstance(text, str) or not text.strip():
                    self.skipped.add("empty_caption", f"image_id {row['image_id']}")
                else:
                    captions[row["image_id"]].append(text)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"no COCO-style captions ({type(error).__name__}: {error})",
                where=str(self._path),
                fix=f"give {_EXPECTED}",
            ) from error
        return captions


def coco_candidates(folders: Folders, name: str) -> tuple[Path, ...]:
    """Where an image may lie under COCO's name for it, as the file says it, and under the shorter one of 2017."""
    shorter, is_long = re.subn(r"^COCO_(train|val)2014_", "", Path(name).name)
    return folders.candidates(name, *([shorter] if is_long else []))


def _extra(image: dict[str, Any]) -> Fields:
    """What else the file says of an image; its size is called the original one, as packing may shrink it."""
    renamed = {"width": "original_width", "height": "original_height"}
    known = ("id", "file_name", "captions", "image_id")
    return {renamed.get(name, name): value for name, value in image.items() if name not in known and value != ""}
