"""Any data set as it is downloaded -> a stream of `Row`s, which `data/pack.py` turns into shards.

Implements no part of the paper. LAVIS has one dataset class per source, which reads the annotations again in every
process of every run; here a source is read once, and what comes out has one format. A new source is one more class
with the methods of `Source`, in a file that says the layout it reads and where the files come from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from blip2train.data.shards import IMAGE_EXTENSIONS
from blip2train.errors import DataError

Fields = dict[str, Any]
"""The JSON of one record: captions, image_id, questions, and whatever else the source says."""

_NAMED_EXAMPLES = 10


@dataclass(frozen=True, slots=True)
class FileSlice:
    """Some bytes of a file: a member of a tar, without unpacking it."""

    path: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class Row:
    """One record to be. Small and picklable: the image, and texts beside it, are read by whoever packs the row.

    Args:
        key: of the record, as `safe_key` makes it; sources promise one key per image, not that two images never share
            one: of those with other names, the packer gives the later one a hash of its name.
        name: as the source calls the image; two rows of one key and one name are one image.
        fields: the record's JSON.
        image: encoded bytes, a place in a tar, or paths of which the first that exists is the image.
        texts: files beside the image that `load` adds to `fields`: "json" (an object) and "txt" (one caption).
        needs_text: leave the row out when it has neither captions nor questions.
        tidy: last change to the fields, of the key and them, once the texts are in; a function of a module, so that
            it can be sent to another process.
    """

    key: str
    name: str
    fields: Mapping[str, Any]
    image: bytes | FileSlice | tuple[Path, ...]
    texts: Mapping[str, Path | FileSlice] = field(default_factory=dict)
    needs_text: bool = True
    tidy: Callable[[str, Fields], Fields] | None = None


@dataclass
class Skipped:
    """What was left out: counts by cause, and the first names of each.

    Args:
        counts: by cause.
        examples: the first names, by cause.
        tell: hears of every one, (cause, name, count), for the full list.
    """

    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    tell: Callable[[str, str, int], None] | None = None

    def fresh(self) -> Skipped:
        """Nothing left out so far, told to the same listener."""
        return Skipped(tell=self.tell)

    def add(self, cause: str, name: str, count: int = 1) -> None:
        self.counts[cause] += count
        if self.tell is not None:
            self.tell(cause, name, count)
        if len(self.examples[cause]) < _NAMED_EXAMPLES:
            self.examples[cause].append(name)

    def merged(self, other: Skipped) -> Skipped:
        both = Skipped()
        for part in (self, other):
            for cause, count in part.counts.items():
                both.counts[cause] += count
                both.examples[cause] = (both.examples[cause] + part.examples[cause])[:_NAMED_EXAMPLES]
        return both


class Source(Protocol):
    """A data set on disk.

    `rows` yields the same rows in the same order every time and holds no more than the annotations in memory;
    `skipped` counts what the latest call of `rows` left out so far.
    """

    skipped: Skipped

    def identity(self) -> dict[str, Any]:
        """What the data set is, JSON-able: kind, places, settings, and a hash of the annotations."""
        ...

    def count(self) -> int | None:
        """Number of rows, where it is known without reading everything."""
        ...

    def rows(self) -> Iterator[Row]: ...

    def notes(self) -> dict[str, Any]:
        """What else the manifest should say, once all rows are read: downloads that failed, by cause."""
        ...


def load(row: Row) -> tuple[Fields, bytes] | str:
    """(the record's JSON, its encoded image), or the cause why there is no record: "missing_image", "empty_file",
    "unreadable_file", "bad_json", "bad_text", "no_caption"."""
    fields = dict(row.fields)
    try:
        for kind in ("json", "txt"):  # a txt only counts where the JSON has no captions
            cause = _add_text(fields, kind, row.texts[kind]) if kind in row.texts else None
            if cause is not None:
                return cause
        if row.tidy is not None:
            fields = row.tidy(row.key, fields)
        if row.needs_text and not fields.get("captions") and not fields.get("questions"):
            return "no_caption"
        image = _read_image(row)
    except OSError:
        return "unreadable_file"
    if image is None:
        return "missing_image"
    return (fields, image) if image else "empty_file"


def safe_key(name: str) -> str:
    """A record key from a path or name: no dots (they end a key in a tar), slashes kept. Several names may have one."""
    key = re.sub(r"[^\w/-]", "_", name).strip("/_").replace("__MACOSX/", "MACOSX/")  # which readers pass over
    return key or "_".join(str(byte) for byte in name.encode("utf-8", "surrogatepass"))


def is_image(name: str) -> bool:
    """Whether the file name ends as an image's does."""
    return Path(name).suffix.lower().lstrip(".") in IMAGE_EXTENSIONS


def existing_folder(path: str | Path) -> Path:
    """The path, expanded.

    Raises:
        DataError: no folder is there.
    """
    found = Path(path).expanduser()
    if not found.is_dir():
        what = "a file where a folder is expected" if found.exists() else f"no folder {found}"
        raise DataError(what, where=f"{found} (working folder {Path.cwd()})", fix="check the path")
    return found


def existing_file(path: str | Path) -> Path:
    """The path, expanded.

    Raises:
        DataError: no file is there.
    """
    found = Path(path).expanduser()
    if not found.is_file():
        what = "a folder where a file is expected" if found.exists() else f"no file {found}"
        raise DataError(what, where=f"{found} (working folder {Path.cwd()})", fix="check the path")
    return found


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Folders:
    """Where the images of a source may lie: a folder and those of its usual subfolders that exist.

    Args:
        root: what the user gave.
        subfolders: names below it that the official archives unpack to.
        foreign: absolute names are of another machine: their last two parts, and their last, are tried too.
    """

    def __init__(self, root: Path, subfolders: Iterable[str] = (), *, foreign: bool = False) -> None:
        subfolders = list(subfolders)
        self.root = root
        self._folders = [root, *(root / name for name in subfolders if (root / name).is_dir())]
        self._known = {Path(name).name for name in subfolders}
        self._foreign = foreign

    def candidates(self, *names: str) -> tuple[Path, ...]:
        """Paths at which an image of one of these names may lie, in order.

        Of a name like "val2014/x.jpg" in a source that has a folder val2014 the last part is enough; any other name
        is taken whole, as "a/1.jpg" and "b/1.jpg" are two images. "./a.jpg" and "a.jpg" are one path.
        """
        tried = [part for name in names for part in self._parts(name)]
        return tuple(Path(os.path.normpath(folder / name)) for name in dict.fromkeys(tried) for folder in self._folders)

    def key(self, name: str) -> str:
        """The record key of an image: what tells its name from the others of the source."""
        path = Path(name)
        if path.parent.name in self._known:
            return safe_key(path.stem)
        return safe_key(str(Path(*path.with_suffix("").parts[-2:]) if path.is_absolute() else path.with_suffix("")))

    def _parts(self, name: str) -> list[str]:
        path = Path(name)
        if path.is_absolute() and self._foreign:
            return [name, str(Path(*path.parts[-2:])), path.name]
        return [name, path.name] if path.parent.name in self._known else [name]


def first_image_id(stem: str) -> int | str:
    """An image id from a file name without its ending: the number it is or ends with after "_", else the name."""
    last = stem.rsplit("_", 1)[-1]
    return int(last) if last.isdecimal() and len(last) <= 18 else stem


def captions_of(found: Any) -> list[str]:
    """The texts in a caption field: one string or a list; what is no text, or blank, is not a caption."""
    texts = [found] if isinstance(found, str) else found if isinstance(found, list | tuple) else []
    return [text for text in texts if isinstance(text, str) and text.strip()]


def is_text(value: str) -> bool:
    """Whether it can be written: JSON may hold halves of surrogate pairs, and broken UTF-8 is read as such."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _add_text(fields: Fields, kind: str, place: Path | FileSlice) -> str | None:
    """Add what a file beside the image says; returns a cause when it is broken."""
    data = place.read_bytes()
    try:
        if kind == "txt":
            if not fields.get("captions"):
                fields["captions"] = captions_of(data.decode("utf-8").strip())
            return None
        loaded = json.loads(data)
    except UnicodeDecodeError:
        return "bad_text" if kind == "txt" else "bad_json"
    except ValueError:
        return "bad_json"
    if not isinstance(loaded, dict):
        return "bad_json"
    captions = captions_of(loaded.pop("captions", None)) or captions_of(loaded.pop("caption", None))
    for name, value in loaded.items():
        fields.setdefault(name, value)
    if captions and not fields.get("captions"):
        fields["captions"] = captions
    return None


def _read_image(row: Row) -> bytes | None:
    if isinstance(row.image, bytes):
        return row.image
    if isinstance(row.image, FileSlice):
        return row.image.read_bytes()
    path = next((path for path in row.image if path.is_file()), None)
    return None if path is None else path.read_bytes()
