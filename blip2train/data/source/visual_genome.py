"""Visual Genome's region descriptions and its questions -> one row per image.

Official layout, from https://homes.cs.washington.edu/~ranjay/visualgenome/api.html (images part 1 and part 2, region
descriptions, question answers; versions 1.0 to 1.4):

    VG_100K/2.jpg  VG_100K_2/1.jpg        both parts, in either folder
    region_descriptions.json  [{"id": 1, "regions": [{"region_id", "image_id", "phrase", "x", "y", "width",
                               "height"}]}]
    question_answers.json     [{"id": 1, "qas": [{"qa_id", "image_id", "question", "answer", "a_objects",
                               "q_objects"}]}]

A region's phrase is a caption of the whole image, as in BLIP: without repeats, about 50 per image. BLIP used 821K of
the 5.4M (https://github.com/salesforce/BLIP/issues/27), after filters of which the sources do not say everything;
its list `vg_caption.json` is read by `data/source/lavis.py`, and is what reproduces the paper. `image_id` is "vg/1":
Visual Genome's numbers mean other images in COCO.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from blip2train.data.source.base import (
    Fields,
    Folders,
    Row,
    Skipped,
    captions_of,
    existing_file,
    existing_folder,
    sha256,
)
from blip2train.data.source.json_file import iterate_list, opens_with, wrong_file

VISUAL_GENOME_FOLDERS = ("VG_100K", "VG_100K_2", "images", "images/VG_100K", "images/VG_100K_2")
VISUAL_GENOME_ID = "vg/"

Part = Literal["regions", "qas"]

_EXPECTED = {"regions": "region_descriptions.json", "qas": "question_answers.json"}


class VisualGenomeSource:
    """Captions, or questions, of Visual Genome; the file is read image by image.

    Args:
        images: the folder above VG_100K and VG_100K_2, or one that holds all images.
        annotations: region_descriptions.json or question_answers.json.
        part: which of the two.

    Raises:
        DataError: a file or folder is missing, or the JSON is another one.
    """

    def __init__(self, images: str | Path, annotations: str | Path, *, part: Part) -> None:
        self.skipped = Skipped()
        self._folders = Folders(existing_folder(images), VISUAL_GENOME_FOLDERS)
        self._path, self._part = existing_file(annotations), part
        first = next(iterate_list(self._path), None) if opens_with(self._path) == "[" else None
        if not isinstance(first, dict) or part not in first:
            raise wrong_file(self._path, f"Visual Genome's {_EXPECTED[part]}")

    def identity(self) -> dict[str, Any]:
        kind = "visual_genome" if self._part == "regions" else "vg_qa"
        place = {"images": str(self._folders.root), "annotations": str(self._path)}
        return {"kind": kind, **place, "sha256": sha256(self._path)}

    def count(self) -> int | None:
        return None

    def rows(self) -> Iterator[Row]:
        """In the order of the file."""
        self.skipped = self.skipped.fresh()
        for index, element in enumerate(iterate_list(self._path)):
            entries = element.get(self._part) if isinstance(element, dict) else None
            image_id = _image_id(element, entries)
            if not isinstance(entries, list) or image_id is None:
                self.skipped.add("bad_json", f"{self._path.name} element {index}: no id or no {self._part}")
                continue
            name = f"{image_id}.jpg"
            fields = self._captions(entries) if self._part == "regions" else self._questions(entries, name)
            fields |= {"image_id": f"{VISUAL_GENOME_ID}{image_id}", "visual_genome_id": image_id}
            yield Row(str(image_id), name, fields, self._folders.candidates(name))

    def notes(self) -> dict[str, Any]:
        return {}

    def _captions(self, regions: list[dict[str, Any]]) -> Fields:
        captions = captions_of([region.get("phrase") for region in regions])
        return {"captions": list(dict.fromkeys(caption.strip() for caption in captions))}

    def _questions(self, entries: list[dict[str, Any]], name: str) -> Fields:
        questions = []
        for entry in entries:
            if not entry.get("question") or not entry.get("answer"):
                self.skipped.add("bad_question", f"{name} qa_id {entry.get('qa_id')}")
                continue
            questions.append(
                {
                    "question_id": str(entry["qa_id"]),
                    "question": entry["question"],
                    "answers": [entry["answer"]],
                    "kind": str(entry["question"]).split(maxsplit=1)[0].lower(),
                }
            )
        return {"questions": questions}


def _image_id(element: Any, entries: Any) -> int | None:
    """`id` of the versions from 1.2 on, `image_id` of the older ones, or the one of the entries."""
    if not isinstance(element, dict):
        return None
    found = element.get("id", element.get("image_id"))
    if found is None and isinstance(entries, list) and entries and isinstance(entries[0], dict):
        found = entries[0].get("image_id", entries[0].get("image"))
    return int(found) if isinstance(found, int) or (isinstance(found, str) and found.isdecimal()) else None
