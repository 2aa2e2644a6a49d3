"""COCO, Flickr30k and Flickr8k in Karpathy's splits -> one row per image.

Layout, from https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip:

    dataset_coco.json        {"dataset": "coco", "images": [{"filepath": "val2014", "filename": "COCO_val2014_....jpg",
                              "cocoid", "imgid", "split", "sentids",
                              "sentences": [{"raw", "tokens", "imgid", "sentid"}]}]}
    dataset_flickr30k.json   the same without filepath and cocoid

COCO's splits are train (82,783), restval (30,504: the rest of val2014), val and test (5,000 each); "train+restval" is
what BLIP and LAVIS train on. Flickr30k: train 29,000, val 1,014, test 1,000.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip2train.data.source.base import (
    Fields,
    Folders,
    Row,
    Skipped,
    captions_of,
    existing_file,
    existing_folder,
    first_image_id,
)
from blip2train.data.source.base import sha256 as file_sha256
from blip2train.data.source.coco import COCO_FOLDERS, coco_candidates
from blip2train.data.source.json_file import load_json, opens_with, wrong_file
from blip2train.errors import ConfigError, DataError

FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images", "flickr30k-images/flickr30k-images", "images", "Images")

_EXPECTED = "dataset_coco.json or dataset_flickr30k.json of Karpathy's caption_datasets.zip"


class KarpathySource:
    """One split, or some, of a Karpathy JSON.

    Args:
        images: folder of the files, or the one above `train2014` and `val2014`.
        annotations: the JSON.
        split: such as "test" or "train+restval".
        kind: what the manifest calls it.

    Raises:
        DataError: a file or folder is missing, or the JSON is another one.
        ConfigError: no such split.
    """

    def __init__(
        self, images: str | Path, annotations: str | Path, *, split: str | None = None, kind: str = "karpathy"
    ) -> None:
        self.skipped = Skipped()
        self._folders = Folders(existing_folder(images), (*COCO_FOLDERS, *FLICKR_FOLDERS))
        self._path, self._kind = existing_file(annotations), kind
        content = load_json(self._path, _without_tokens) if opens_with(self._path) == "{" else {}
        images_found = content.get("images")
        if not images_found or not isinstance(images_found, list) or "sentences" not in images_found[0]:
            raise wrong_file(self._path, _EXPECTED)
        sizes = Counter(image.get("split") for image in images_found)
        self._splits = [name for name in (split or "").split("+") if name]
        if not self._splits or set(self._splits) - set(sizes):
            known = ", ".join(f"{name} ({count:,} images)" for name, count in sizes.items())
            raise ConfigError(
                f"split={split}" if split else "no split",
                where=str(self._path),
                fix=f"give split= one of {known}, or several joined by +",
            )
        self._images: list[dict[str, Any]] = [image for image in images_found if image.get("split") in self._splits]

    def identity(self) -> dict[str, Any]:
        place = {"images": str(self._folders.root), "annotations": str(self._path)}
        return {"kind": self._kind, **place, "split": "+".join(self._splits), "sha256": file_sha256(self._path)}

    def count(self) -> int | None:
        return len(self._images)

    def rows(self) -> Iterator[Row]:
        """In the order of the file."""
        self.skipped = self.skipped.fresh()
        for image in self._images:
            try:
                name = str(Path(image.get("filepath", "")) / image["filename"])
                captions = captions_of([sentence["raw"] for sentence in image["sentences"]])
            except (KeyError, TypeError) as error:
                raise DataError(
                    f"an image without {error}", where=str(self._path), fix=f"give {_EXPECTED} as downloaded"
                ) from error
            stem = Path(name).stem
            fields: Fields = {
                "captions": captions,
                "image_id": image.get("cocoid", first_image_id(stem)),
                "split": image["split"],
            }
            yield Row(self._folders.key(name), name, fields, coco_candidates(self._folders, name))

    def notes(self) -> dict[str, Any]:
        return {}


def _without_tokens(value: dict[str, Any]) -> dict[str, Any]:
    """A sentence without its list of words, which is most of the file."""
    return {"raw": value["raw"]} if "raw" in value else value
