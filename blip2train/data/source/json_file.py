"""JSON annotation files: read element by element where they are long lists, and described when they are the wrong ones.

Implements no part of the paper. LAVIS loads every annotation file whole, in every process.

`python -m blip2train.data.source.json_file FILE` prints the elements of a list, one per line: img2dataset reads a file
of urls whole, and some are larger than memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blip2train.errors import DataError

_CHUNK = 1 << 20
_BROKEN = "surrogateescape"
"""Bytes that are no UTF-8 become marks, which the packer finds: they cost a record, not the file."""
_BETWEEN = ", \t\r\n"


def load_json(path: Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The whole file; `object_hook` as in `json.load`, to keep less than all of it.

    Raises:
        DataError: it is no JSON.
    """
    try:
        with path.open(encoding="utf-8-sig", errors=_BROKEN) as file:
            return json.load(file, object_hook=object_hook)
    except ValueError as error:
        raise DataError(
            f"no JSON ({error})", where=str(path), fix="check that it is the file meant; if so, download it again"
        ) from error


def iterate_list(path: Path) -> Iterator[Any]:
    """The elements of a file that is one JSON list, a chunk of the file in memory at a time.

    Raises:
        DataError: it is no JSON, or another JSON than a list.
    """
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig", errors=_BROKEN) as file:
        text = file.read(_CHUNK).lstrip()
        if not text.startswith("["):
            raise DataError(f"{describe(path)} where a list is expected", where=str(path), fix="check the file")
        position = 1
        while True:
            position = _skip(text, position)
            if position < len(text) and text[position] == "]":
                return
            try:
                value, end = decoder.raw_decode(text, position)
                # a number may go on behind the end of the chunk: "15" of "15.5"
                is_whole = text[end : end + 1] in tuple(_BETWEEN + "]")
            except ValueError:
                is_whole = False
            if is_whole:
                yield value
                position = end
                continue
            more = file.read(max(_CHUNK, len(text) - position))
            if not more:
                raise DataError("a JSON list that is cut off or broken", where=str(path), fix="download it again")
            text, position = text[position:] + more, 0


def opens_with(path: Path) -> str:
    """The first character of the file that is no space: "[" for a list, "{" for an object, "" for none."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(_CHUNK).lstrip()[:1]


def describe(path: Path) -> str:
    """What the file holds, for a message: "an object with the keys images, annotations"."""
    first = opens_with(path)
    if first == "[":
        element = next(iterate_list(path), None)
        return f"a list of objects with {_keys(element)}" if isinstance(element, dict) else "a list"
    if first == "{":
        return f"an object with {_keys(load_json(path))}"
    return "no JSON"


def wrong_file(path: Path, expected: str) -> DataError:
    """The error for a JSON that another data set, or another part of this one, is made of."""
    return DataError(describe(path), where=str(path), fix=f"give {expected}")


def _keys(value: dict[str, Any]) -> str:
    names = list(value)
    return "the keys " + ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "no keys"


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _BETWEEN:
        position += 1
    return position


if __name__ == "__main__":
    for element in iterate_list(Path(sys.argv[1])):
        sys.stdout.write(json.dumps(element, ensure_ascii=False) + "\n")
