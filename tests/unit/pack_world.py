"""A source made of files on disk, and a program that packs it and can be killed."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shard_factory import encode, noise

from blip2train.data.pack import pack
from blip2train.data.pack_worker import PackSettings
from blip2train.data.source.base import Row, Skipped


class ListSource:
    """Rows as they are given, after `bad_lines` that could not be read."""

    def __init__(self, rows: list[Row], name: str = "list", bad_lines: int = 0) -> None:
        self._rows, self._name, self._bad_lines = rows, name, bad_lines
        self.skipped = Skipped()
        self.stop_before: int | None = None

    def identity(self) -> dict[str, Any]:
        return {"kind": self._name}

    def count(self) -> int | None:
        return len(self._rows)

    def notes(self) -> dict[str, Any]:
        return {"failed_downloads": {"404": 3}}

    def rows(self) -> Iterator[Row]:
        self.skipped = self.skipped.fresh()
        for number in range(self._bad_lines):
            self.skipped.add("bad_json", f"line {number}")
        for index, row in enumerate(self._rows):
            if index == self.stop_before:
                raise KeyboardInterrupt
            yield row


def write_images(folder: Path, count: int) -> list[Row]:
    """Rows of `count` JPEGs; every seventh image is missing and every eleventh does not decode."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        data = encode(noise(number, 40, 60), "jpg")
        if number % 7 != 6:
            path.write_bytes(data[:200] if number % 11 == 10 else data)
        rows.append(Row(f"k{number}", path.name, {"captions": [f"picture {number}"], "image_id": number}, (path,)))
    return rows


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a packed folder; of the manifest only what may not differ."""
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["made"]
    return files | {"manifest": json.dumps(manifest).encode()}


SETTINGS = PackSettings(samples_per_shard=4, resize_short_side=20, validate_images=True)

if __name__ == "__main__":
    images, out, count, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    pack(ListSource(write_images(images, count)), out, SETTINGS, workers=workers)
