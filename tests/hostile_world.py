"""Shards with one of each defect that real data has, a tenth of all records, and a plan of what must be counted.

    world = build_hostile_world(folder)
    world.urls, world.planned       # {"corrupt_image": 6, ...}: records of each cause; the others can be used

Written with the standard library and PIL alone, so that nothing of the reading side is tested against itself. Besides
the defects it holds what only looks like one and must be used: rare image formats, EXIF, long and odd captions, keys
that would be paths. From a shell: `python tests/hostile_world.py FOLDER`.
"""

import argparse
import hashlib
import io
import json
import struct
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

Files = list[tuple[str, bytes]]
"""(extension, content) of one record."""

NUM_RECORDS, RECORDS_PER_SHARD = 400, 40
NUM_IN_TRUNCATED, LOST_IN_TRUNCATED, NUM_UNREADABLE = 40, 5, 4


@dataclass(frozen=True, slots=True)
class HostileWorld:
    """What was written.

    Args:
        folder: holds the tars and index.json.
        urls: the tars.
        num_records: that the index promises, whether they can be had or not.
        planned: cause -> records that must be dropped for it; all others must be used.
        dropped_keys: key -> cause, of those records that have a key at all.
        used_keys: keys of records that look odd and must be used.
    """

    folder: Path
    urls: list[str]
    num_records: int
    planned: dict[str, int]
    dropped_keys: dict[str, str]
    used_keys: list[str]

    @property
    def num_dropped(self) -> int:
        return sum(self.planned.values())


def picture(number: int = 0, mode: str = "RGB") -> Image.Image:
    colours = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((72, 56), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def good(number: int) -> Files:
    fields = {"captions": [f"picture number {number}", f"image {number} again"], "image_id": number}
    return [("jpg", encoded(picture(number))), ("json", json.dumps(fields).encode())]


def with_image(data: bytes, extension: str = "jpg") -> Files:
    return [(extension, data), ("json", b'{"captions": ["a dog on a lawn"]}')]


def with_json(data: bytes | object) -> Files:
    return [("jpg", encoded(picture())), ("json", data if isinstance(data, bytes) else json.dumps(data).encode())]


def png_bomb() -> bytes:
    """60000 x 60000 pixels promised, and a row of them there."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(180001)))]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg_bomb() -> bytes:
    data = bytearray(encoded(picture()))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65000, 65000)
    return bytes(data)


def gif_bomb() -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 65000, 65000, 0) + b"\x02\x00"
    return b"GIF89a" + struct.pack("<HHBBB", 65000, 65000, 0, 0, 0) + frame * 3 + b"\x3b"


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), exif=exif)


def animated(kind: str) -> bytes:
    return encoded(picture(), kind, save_all=True, append_images=[picture(1), picture(2)])


DEFECTS: list[tuple[str, str, Callable[[], Files]]] = [
    ("no_image", "no image at all", lambda: [("json", b'{"captions": ["a dog"]}')]),
    ("corrupt_image", "JPEG cut in half", lambda: with_image(encoded(picture())[:600])),
    ("corrupt_image", "JPEG cut before its end mark", lambda: with_image(encoded(picture())[:-2])),
    ("corrupt_image", "a web page", lambda: with_image(b"<html><body>404 not found</body></html>")),
    ("corrupt_image", "no bytes", lambda: with_image(b"")),
    ("corrupt_image", "PNG cut in half", lambda: with_image(encoded(picture(), "PNG")[:900], "png")),
    ("corrupt_image", "PostScript", lambda: with_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")),
    ("image_too_large", "PNG bomb", lambda: with_image(png_bomb(), "png")),
    ("image_too_large", "JPEG bomb", lambda: with_image(jpeg_bomb())),
    ("image_too_large", "GIF bomb", lambda: with_image(gif_bomb(), "gif")),
    ("bad_json", "JSON cut off", lambda: with_json(b'{"captions": ["a dog"')),
    ("bad_json", "a list", lambda: with_json(["a dog"])),
    ("bad_json", "a number for captions", lambda: with_json({"captions": 3})),
    ("bad_json", "a list of numbers", lambda: with_json({"captions": [1, 2]})),
    ("bad_json", "nested too deep", lambda: with_json(b'{"captions": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
    ("bad_json", "no bytes", lambda: with_json(b"")),
    ("bad_text", "JSON in Latin-1", lambda: with_json('{"captions": ["a café"]}'.encode("latin-1"))),
    ("bad_text", "txt in Latin-1", lambda: [("jpg", encoded(picture())), ("txt", "a café".encode("latin-1"))]),
    ("bad_text", "half a surrogate pair", lambda: with_json(b'{"captions": ["a dog \\ud83d"]}')),
    ("bad_text", "NUL", lambda: with_json({"captions": ["a\0dog"]})),
    ("no_caption", "no caption", lambda: with_json({"image_id": 7})),
    ("no_caption", "an empty list", lambda: with_json({"captions": []})),
    ("no_caption", "null", lambda: with_json({"caption": None})),
    ("no_caption", "NaN, as pandas writes it", lambda: with_json(b'{"caption": NaN}')),
    ("no_caption", "an image alone", lambda: [("jpg", encoded(picture()))]),
    ("empty_caption", "nothing", lambda: with_json({"captions": [""]})),
    ("empty_caption", "white space and marks", lambda: with_json({"captions": [" ... ", "\n", "!"]})),
    ("empty_caption", "only invisible characters", lambda: with_json({"caption": "\u200b\ufeff\u00a0"})),
    ("empty_caption", "empty txt", lambda: [("jpg", encoded(picture())), ("txt", b"\n")]),
    ("duplicate_key", "the key of the first record", lambda: good(1000)),
    ("duplicate_key", "the key of the first record again", lambda: good(1001)),
]
"""(cause, what it is, the record); each is one record of its own."""

ODDITIES: list[tuple[str, Callable[[], Files]]] = [
    *[(f"{mode} JPEG", lambda mode=mode: with_image(encoded(picture(0, mode)))) for mode in ("L", "CMYK")],
    *[(f"{mode} PNG", lambda mode=mode: with_image(encoded(picture(0, mode), "PNG"), "png")) for mode in ("P", "LA")],
    ("16-bit PNG", lambda: with_image(encoded(Image.fromarray(np.full((40, 40), 30000, np.uint16)), "PNG"), "png")),
    *[(f"animated {kind}", lambda kind=kind: with_image(animated(kind), kind.lower())) for kind in ("GIF", "WEBP")],
    ("animated PNG", lambda: with_image(animated("PNG"), "png")),
    *[(f"EXIF {number}", lambda number=number: with_image(turned(number))) for number in range(1, 9)],
    *[(f"{kind} called jpg", lambda kind=kind: with_image(encoded(picture(), kind))) for kind in ("BMP", "TIFF")],
    ("AVIF called jpg", lambda: with_image(encoded(picture(), "AVIF"))),
    ("one pixel", lambda: with_image(encoded(Image.new("RGB", (1, 1)), "PNG"), "png")),
    ("a very long caption", lambda: with_json({"captions": ["a dog and " * 100_000]})),
    ("one word without an end", lambda: with_json({"captions": ["woof" * 250_000]})),
    ("emoji and Chinese", lambda: with_json({"captions": ["一只狗 \U0001f415 \u202eright to left"]})),
    ("one good caption among bad", lambda: with_json(b'{"captions": ["", "a dog", 7, null, "\\ud83d"]}')),
    ("odd fields", lambda: with_json(b'{"captions": ["a dog"], "image_id": 1e400, "__key__": "x", "questions": null}')),
    ("a byte-order mark", lambda: [("jpg", encoded(picture())), ("txt", b"\xef\xbb\xbfa dog")]),
    ("upper-case extensions", lambda: [("JPG", encoded(picture())), ("JSON", b'{"caption": "a dog"}')]),
]  # fmt: skip
"""Records that look broken and are not."""

HOSTILE_KEYS = [
    "../../outside",
    "/tmp/hostile_absolute",
    "a\nline break",
    "caf\udce9",
    "-rf",
    "$(touch evil)",
    "x" * 200,
]
"""Member names that must stay names."""


def build_hostile_world(folder: Path) -> HostileWorld:
    """Write the shards and their index; the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    records: list[tuple[str, Files]] = []
    dropped_keys: dict[str, str] = {}
    planned: Counter[str] = Counter()
    for place, (cause, _, make) in enumerate(DEFECTS):
        key = "good-0" if cause == "duplicate_key" else f"bad-{place}"
        dropped_keys[key] = cause
        planned[cause] += 1
        records.append((key, make()))
    odd = [(f"odd-{place}", make()) for place, (_, make) in enumerate(ODDITIES)]
    odd += [(key, good(2000 + place)) for place, key in enumerate(HOSTILE_KEYS)]
    whole = NUM_RECORDS - NUM_IN_TRUNCATED - NUM_UNREADABLE
    plain = [(f"good-{number}", good(number)) for number in range(whole - len(records) - len(odd))]
    # defects are spread, duplicates lie in the shard of their first
    step = whole // len(records)
    spread = [*plain, *odd]
    for place, record in enumerate(records):
        at = 5 + place if record[0] == "good-0" else (place + 1) * step
        spread.insert(at, record)
    rows = []
    for number, start in enumerate(range(0, len(spread), RECORDS_PER_SHARD)):
        part = spread[start : start + RECORDS_PER_SHARD]
        rows.append(_write(folder / f"hostile-{number:06d}.tar", part, links=number == 0))
    rows.append(_write_truncated(folder / "truncated.tar"))
    rows.append(_write_unreadable(folder / "unreadable.tar"))
    planned["truncated_shard"] = LOST_IN_TRUNCATED
    planned["unreadable_shard"] = NUM_UNREADABLE
    total = sum(row["num_records"] for row in rows)
    index = {"format": 1, "num_records": total, "shards": rows}
    (folder / "index.json").write_text(json.dumps(index))
    urls = [str(folder / row["name"]) for row in rows]
    assert total == NUM_RECORDS
    return HostileWorld(folder, urls, total, dict(planned), dropped_keys, [key for key, _ in odd])


def _write(path: Path, records: list[tuple[str, Files]], links: bool = False) -> dict[str, object]:
    with tarfile.open(path, "w") as tar:
        for key, files in records:
            for extension, data in files:
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        if links:
            _add_links(tar)
    return _row(path, len(records))


def _add_links(tar: tarfile.TarFile) -> None:
    """Members that an extraction would follow, and that are no records."""
    for name, kind, target in (
        ("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        ("../../escape.json", tarfile.SYMTYPE, "../../outside"),
        ("hard.jpg", tarfile.LNKTYPE, "good-0.jpg"),
        ("pipe.jpg", tarfile.FIFOTYPE, ""),
        ("folder.jpg", tarfile.DIRTYPE, ""),
    ):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        tar.addfile(member)


def _write_truncated(path: Path) -> dict[str, object]:
    """A copy that stopped: the last records are lost, the first of them in the middle of its image."""
    kept = NUM_IN_TRUNCATED - LOST_IN_TRUNCATED
    row = _write(path, [(f"cut-{number}", good(3000 + number)) for number in range(NUM_IN_TRUNCATED)])
    with tarfile.open(path) as tar:
        end = tar.getmember(f"cut-{kept}.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:end])
    return row


def _write_unreadable(path: Path) -> dict[str, object]:
    row = _write(path, [(f"lost-{number}", good(4000 + number)) for number in range(NUM_UNREADABLE)])
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    return row


def _row(path: Path, num_records: int) -> dict[str, object]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"name": path.name, "num_records": num_records, "num_bytes": path.stat().st_size, "sha256": digest}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    world = build_hostile_world(parser.parse_args().folder)
    sys.stdout.write(f"{world.num_records} records, {world.num_dropped} of them to be dropped: {world.planned}\n")
