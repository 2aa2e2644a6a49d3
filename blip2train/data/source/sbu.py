"""SBU captions: the two lists of the original release with the photographs beside them -> one row per photograph.

Official layout, from https://www.cs.rice.edu/~vo9/sbucaptions/ (SBUCaptionedPhotoDataset.tar.gz):

    SBU_captioned_photo_dataset_urls.txt        one url per line
    SBU_captioned_photo_dataset_captions.txt    the caption on the line of the same number
    4385058960_b0f291553e.jpg                   photographs by the last part of their url, as torchvision and LAVIS
                                                fetch them

Fetched with img2dataset instead (the command is in configs/data/dataset/sbu.yaml), SBU is read as its output is:
`data/source/img2dataset.py`; LAVIS's list `sbu.json` by `data/source/lavis.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from blip2train.data.source.base import Folders, Row, Skipped, existing_file, existing_folder, safe_key, sha256
from blip2train.errors import DataError

_EXPECTED = "SBU_captioned_photo_dataset_urls.txt and SBU_captioned_photo_dataset_captions.txt"


class SbuSource:
    """The million photographs of the original lists.

    Args:
        images: folder of the photographs, or the one above `dataset` or `images`.
        files: the two lists in any order.

    Raises:
        DataError: a file or folder is missing, or the lists are of different length.
    """

    def __init__(self, images: str | Path, files: Sequence[str | Path]) -> None:
        self.skipped = Skipped()
        self._folders = Folders(existing_folder(images), ("dataset", "images"))
        paths = [existing_file(path) for path in files]
        urls = [path for path in paths if _starts_with_url(path)]
        if len(paths) != 2 or len(urls) != 1:
            raise DataError(
                f"{len(urls)} of {len(paths)} files are lists of urls",
                where=", ".join(map(str, paths)),
                fix=f"give {_EXPECTED}",
            )
        self._urls, self._captions = urls[0], next(path for path in paths if path != urls[0])
        lengths = [_count_lines(path) for path in (self._urls, self._captions)]
        if lengths[0] != lengths[1]:
            raise DataError(
                f"{lengths[0]} urls and {lengths[1]} captions",
                where=f"{self._urls}, {self._captions}",
                fix=f"give {_EXPECTED} as downloaded: the lines belong together by number",
            )
        self._count = lengths[0]

    def identity(self) -> dict[str, Any]:
        place = {"images": str(self._folders.root), "annotations": [str(self._urls), str(self._captions)]}
        return {"kind": "sbu", **place, "sha256": [sha256(self._urls), sha256(self._captions)]}

    def count(self) -> int | None:
        return self._count

    def rows(self) -> Iterator[Row]:
        """In the order of the lists."""
        self.skipped = self.skipped.fresh()
        with self._urls.open("rb") as urls, self._captions.open("rb") as captions:
            for number, (raw_url, raw_caption) in enumerate(zip_longest(urls, captions), start=1):
                try:
                    url, caption = raw_url.decode("utf-8").strip(), raw_caption.decode("utf-8").strip()
                except UnicodeDecodeError:
                    self.skipped.add("bad_text", f"line {number}")
                    continue
                name = url.rsplit("/", 1)[-1]
                stem = Path(name).stem
                fields = {"captions": [caption] if caption else [], "image_id": f"sbu/{stem}", "url": url}
                yield Row(safe_key(stem), name, fields, self._folders.candidates(name))

    def notes(self) -> dict[str, Any]:
        return {}


def _starts_with_url(path: Path) -> bool:
    with path.open("rb") as file:
        return file.readline(1000).startswith((b"http://", b"https://"))


def _count_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for _ in lines)
