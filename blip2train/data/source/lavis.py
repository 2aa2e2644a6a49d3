"""The lists of annotations that BLIP and LAVIS publish -> one row per image.

Layout, from https://storage.googleapis.com/sfr-vision-language-research/ (configs/datasets/*/ in LAVIS names each):
one JSON list with an object per caption, per image or per question.

    coco_karpathy_train.json   {"image": "val2014/COCO_val2014_....jpg", "caption": "...", "image_id": "coco_522418"}
    coco_karpathy_test.json    {"image": "...", "caption": ["...", ...]}            flickr30k_*.json: the same
    vg_caption.json            {"image": ".../VG_100K/2.jpg", "caption": "..."}     paths of the authors' machines
    sbu.json                   {"image": "4385058960_b0f291553e.jpg", "caption": "...", "url": "..."}
    nocaps_val.json            {"image": "val/0013ea2087020901.jpg", "caption": [...], "img_id": 0, "domain": "..."}
    vqa_train.json             {"image", "question", "question_id", "answer": [...], "dataset": "vqa"}
    vg_qa.json, okvqa_train.json, gqa lists: the same, the answer a string or a list
"""

from __future__ import annotations

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
    is_text,
    sha256,
)
from blip2train.data.source.coco import coco_candidates
from blip2train.data.source.json_file import iterate_list, opens_with, wrong_file
from blip2train.data.source.merge import Entry, Merged

_USED = ("image", "caption", "image_id", "img_id", "question", "question_id", "answer")


class LavisSource:
    """A list of BLIP's or LAVIS's annotations, read object by object.

    Args:
        images: folder of the files; of an absolute path in the list its last two parts, and its last, are tried too.
        annotations: the JSON list.
        kind: what the manifest calls it.
        subfolders: of `images`, where files may lie.
        id_prefix: put before an image id made of the file's name, where names are numbers of this data set only.

    Raises:
        DataError: a file or folder is missing, or the JSON is another one.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        *,
        kind: str,
        subfolders: tuple[str, ...] = (),
        id_prefix: str = "",
    ) -> None:
        self.skipped = Skipped()
        self._folders = Folders(existing_folder(images), subfolders, foreign=True)
        self._path, self._kind, self._id_prefix = existing_file(annotations), kind, id_prefix
        if not is_lavis_list(self._path):
            raise wrong_file(self._path, "a list of objects with `image` and `caption` or `question`")
        self._merged = Merged(self._entries)

    def identity(self) -> dict[str, Any]:
        place = {"images": str(self._folders.root), "annotations": str(self._path)}
        return {"kind": self._kind, **place, "sha256": sha256(self._path)}

    def count(self) -> int | None:
        return self._merged.count()

    def rows(self) -> Iterator[Row]:
        """In the order of the images' first objects."""
        self.skipped = self.skipped.fresh()
        for name, fields in self._merged.entries(self.skipped):
            yield Row(self._folders.key(name), name, fields, coco_candidates(self._folders, name))

    def notes(self) -> dict[str, Any]:
        return {}

    def _entries(self, skipped: Skipped) -> Iterator[Entry]:
        for index, row in enumerate(iterate_list(self._path)):
            name = row.get("image") if isinstance(row, dict) else None
            if isinstance(name, str) and name and is_text(name):
                yield name, self._to_fields(name, row)
            else:
                skipped.add("bad_json", f"{self._path.name} element {index}: no `image`")

    def _to_fields(self, name: str, row: dict[str, Any]) -> Fields:
        found = first_image_id(Path(name).stem)
        fields: Fields = {
            "captions": captions_of(row.get("caption")),
            "image_id": row.get("img_id", f"{self._id_prefix}{found}" if self._id_prefix else found),
        }
        if "question" in row:
            answers = row.get("answer", [])
            question: Fields = {
                "question": row["question"],
                "answers": [str(answer) for answer in answers] if isinstance(answers, list) else [str(answers)],
            }
            question |= {"question_id": str(row["question_id"])} if "question_id" in row else {}
            fields["questions"] = [question]
        return fields | {key: value for key, value in row.items() if key not in _USED}


def is_lavis_list(path: Path) -> bool:
    """Whether the file is a list of objects with an image."""
    if opens_with(path) != "[":
        return False
    first = next(iterate_list(path), None)
    return isinstance(first, dict) and "image" in first and ("caption" in first or "question" in first)
