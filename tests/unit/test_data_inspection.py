"""A check finds nothing in clean data and, in data with one planted defect, that defect in its exact number."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from shard_factory import encode, noise, write_shards, write_tar

from blip2train.data.inspect_record import CheckSettings
from blip2train.data.inspect_shard import source_of
from blip2train.data.inspection import Inspection, inspect_shards
from blip2train.data.pack import pack_records
from blip2train.data.shards import ShardCache, expand_urls
from blip2train.microworld.pack import build_world
from blip2train.microworld.scene import WorldSpec

Files = list[tuple[str, bytes]]
NUM_CLEAN = 6


def inspect(folder: Path, level: str = "full", **options: Any) -> Inspection:
    return inspect_shards(expand_urls(str(folder)), CheckSettings(level, min_side=8), **options)  # type: ignore[arg-type]


def found(inspection: Inspection, *severities: str) -> dict[str, int]:
    rows = inspection.rows()
    return {row["finding"]: row["count"] for row in rows if not severities or row["severity"] in severities}


def picture(number: int) -> bytes:
    return encode(noise(number, 40, 48), "jpg")


def record(key: str, image: bytes | None = None, extension: str = "jpg", **fields: Any) -> Files:
    number = sum(key.encode())
    content = {"captions": [f"a picture called {key}"]} | fields
    data = picture(number) if image is None else image
    return [(f"{key}.{extension}", data), (f"{key}.json", json.dumps(content).encode())]


def clean() -> Files:
    return [file for name in "abcdef" for file in record(name)]


def png(mode: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0]), dtype=np.uint8)).convert(mode).save(
        file, "PNG"
    )
    return file.getvalue()


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def header_of_png(width: int, height: int) -> bytes:
    content = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content))


BOMB = header_of_png(60_000, 60_000)
JPEG = picture(99)
SAME = picture(7)
QUESTION = {"question_id": "1", "question": "what?", "answers": ["this"]}

PLANTED: dict[str, tuple[Files, dict[str, int]]] = {
    "cut JPEGs": (record("x", cut(JPEG)) + record("y", cut(JPEG)), {"corrupt_image": 2}),
    "text as image": (record("x", b"no image at all"), {"corrupt_image": 1}),
    "no image": ([("x.json", b'{"captions": ["alone"]}')], {"no_image": 1}),
    "bombs": (record("x", BOMB, "png") + record("y", BOMB, "png"), {"image_too_large": 2}),
    "bad JSON": ([("x.jpg", JPEG), ("x.json", b"{")], {"bad_json": 1}),
    "bad UTF-8": ([("x.jpg", JPEG), ("x.txt", b"\xff\xfe\xff")], {"bad_text": 1}),
    "no caption": ([("x.jpg", JPEG), ("x.json", b"{}")], {"no_caption": 1}),
    "empty captions": (record("x", captions=["", " ... "]), {"empty_caption": 1}),
    "one empty caption of two": (record("x", captions=["fine", " "]), {"unusable_caption": 1}),
    "long captions": (record("x", captions=["word " * 51, "w " * 60, "v " * 50]), {"long_caption": 2}),
    "same captions": (
        record("x", captions=["A picture called a!"]) + record("y", captions=["one", "ONE."]),
        {"duplicate_caption": 2},
    ),
    "the same key later": (record("a"), {"duplicate_key": 1}),
    "one image twice, two ids": (record("x", SAME) + record("y", SAME), {"duplicate_image_other_id": 1}),
    "one image thrice, one id": (
        [file for key in "xyz" for file in record(key, SAME, image_id=5)],
        {"duplicate_image": 2},
    ),
    "one id, two images": (record("x", image_id=5) + record("y", image_id=5), {"image_id_conflict": 1}),
    "bad questions": (record("x", questions=[{"question": 3}]), {"bad_questions": 1}),
    "null questions": (record("x", questions=None), {}),
    "no answers": (record("x", questions=[QUESTION | {"answers": []}, QUESTION]), {"question_without_answer": 1}),
    "blank question": (record("x", questions=[QUESTION | {"question": " "}]), {"blank_question": 1}),
    "questions alone": (record("x", captions=[], questions=[QUESTION]), {}),
    "tiny": (record("x", png("RGB", (7, 20)), "png"), {"tiny_image": 1}),
    "long and thin": (
        record("x", png("RGB", (100, 10)), "png") + record("y", png("L", (10, 90)), "png"),
        {"odd_aspect": 2},
    ),
    "two images": ([("x.png", png("RGB", (20, 20))), *record("x")], {"several_images": 1}),
    "unknown member": ([*record("x"), ("x.npy", b"0"), ("x.seg.png", b"1")], {"unknown_member": 1}),
    "another format": (record("x", png("RGB", (20, 20)), "jpg"), {"wrong_extension": 1}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_defect_is_found_in_its_exact_number_and_nothing_else(name: str, tmp_path: Path) -> None:
    files, expected = PLANTED[name]
    write_tar(tmp_path / "s-000.tar", clean() + files)
    inspection = inspect(tmp_path)
    assert found(inspection) == expected | {"no_index": 1}
    assert all(
        str(tmp_path / "s-000.tar") in place for name in expected for place in inspection.findings.examples[name]
    )


def test_fast_check_decodes_nothing_and_finds_the_rest(tmp_path: Path) -> None:
    files = clean() + record("x", cut(JPEG)) + record("y", b"no image") + record("z", BOMB, "png") + record("a")
    write_tar(tmp_path / "s-000.tar", files)
    assert found(inspect(tmp_path, "fast"), "error") == {"corrupt_image": 1, "image_too_large": 1, "duplicate_key": 1}
    assert found(inspect(tmp_path), "error") == {"corrupt_image": 2, "image_too_large": 1, "duplicate_key": 1}


def test_real_photographs_and_the_micro_world_are_clean(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "photos" / "captions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    pack_records(
        (
            {
                "key": str(row["coco_id"]),
                "image_bytes": (shared_data / "photos" / row["image"]).read_bytes(),
                "extension": "jpg",
                "json": {"captions": row["captions"], "image_id": row["coco_id"]},
            }
            for row in rows
        ),
        tmp_path / "photos",
        samples_per_shard=50,
    )
    build_world(WorldSpec(seed=3), tmp_path / "world", 40, 20, samples_per_shard=30)
    for name, records in (("photos", len(rows)), ("world", 80)):
        inspection = inspect(tmp_path / name)
        assert inspection.total("records") == records
        assert found(inspection, "error", "warning") == {}, name


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Thirty records in three shards, with index and manifest."""
    pack_records(
        (
            {
                "key": f"k{n}",
                "image_bytes": encode(noise(n, 40, 48), "jpg"),
                "extension": "jpg",
                "json": {"captions": [f"number {n}"]},
            }
            for n in range(30)
        ),
        tmp_path,
        samples_per_shard=10,
    )
    assert found(inspect(tmp_path)) == {}
    return tmp_path


def delete(folder: Path) -> None:
    sorted(folder.glob("*.tar"))[1].unlink()


def add(folder: Path) -> None:
    write_tar(folder / "more.tar", record("x"))


def flip_a_byte(folder: Path) -> None:
    path = sorted(folder.glob("*.tar"))[1]
    data = bytearray(path.read_bytes())
    at = data.index(b"number 1")
    data[at : at + 8] = b"NUMBER 1"
    path.write_bytes(data)


def promise_more(folder: Path) -> None:
    edit(folder / "index.json", num_records=11)


def promise_other_bytes(folder: Path) -> None:
    edit(folder / "index.json", num_bytes=99)


def edit(path: Path, **changes: Any) -> None:
    index = json.loads(path.read_text())
    index["shards"][1] |= changes
    path.write_text(json.dumps(index))
    if path.name == "index.json":  # the manifest says the same
        edit(path.with_name("manifest.json"), **changes)


def contradict(folder: Path) -> None:
    edit(folder / "manifest.json", num_records=11)


def cut_shard(folder: Path) -> None:
    path = sorted(folder.glob("*.tar"))[1]
    with path.open("rb") as file:
        data = file.read()
    # behind the header of the fifth record's image
    at = data.index(b"k14.jpg")
    path.write_bytes(data[: at + 512 + 40])


def overwrite_shard(folder: Path) -> None:
    sorted(folder.glob("*.tar"))[1].write_bytes(b"<html>404 not found</html>" * 100)


def drop_index(folder: Path) -> None:
    (folder / "index.json").unlink()


def empty_shard(folder: Path) -> None:
    write_tar(folder / "shard-000009.tar", [])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (delete, {"missing_shard": 1}),
        (add, {"extra_shard": 1}),
        (flip_a_byte, {"changed_shard": 1}),
        (promise_more, {"wrong_count": 1}),
        (promise_other_bytes, {"changed_shard": 1}),
        (contradict, {"manifest_mismatch": 1}),
        (cut_shard, {"truncated_shard": 6}),
        (overwrite_shard, {"unreadable_shard": 10}),
        (drop_index, {"no_index": 1}),
        (empty_shard, {"empty_shard": 1, "extra_shard": 1}),
    ],
)
def test_shards_are_compared_with_index_and_manifest(
    damage: Callable[[Path], None], expected: dict[str, int], packed: Path
) -> None:
    damage(packed)
    assert found(inspect(packed)) == expected


def test_keys_and_ids_are_judged_within_a_folder_and_images_across_all(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "s-000.tar", record("x", image_id=1) + record("y", SAME))
    write_tar(tmp_path / "a" / "s-001.tar", record("x", picture(1), image_id=2, captions=["other"]))
    write_tar(tmp_path / "b" / "s-000.tar", record("y", image_id=1) + record("z", SAME))
    urls = expand_urls([str(tmp_path / "a"), str(tmp_path / "b")])
    inspection = inspect_shards(urls, CheckSettings())
    expected = {"duplicate_key": 1, "duplicate_image_other_id": 1, "duplicate_caption": 1, "no_index": 2}
    assert found(inspection) == expected
    (place,) = inspection.findings.examples["duplicate_image_other_id"]
    assert place == f"{urls[2]} z: has the image of {urls[0]} y"


def test_remote_shards_are_checked_against_their_index_and_one_out_of_reach_is_named(
    packed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = fsspec.filesystem("memory")
    for path in packed.iterdir():
        if path.is_file() and path.name != "shard-000001.tar":
            store.pipe(f"/checked/{path.name}", path.read_bytes())
    cache = ShardCache(tmp_path_factory.mktemp("cache"), attempts=1)
    urls = [f"memory://checked/shard-{number:06d}.tar" for number in range(3)]
    inspection = inspect_shards(urls, CheckSettings(min_side=8), cache=cache)
    store.rm("/checked", recursive=True)
    assert found(inspection) == {"unreachable_shard": 1}
    assert inspection.total("records") == 20
    assert inspection.findings.examples["unreachable_shard"][0].startswith(urls[1])


@pytest.mark.slow
def test_result_does_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [5, 4, 3, 2], broken={2: b"broken", 9: b""})
    monkeypatch.setattr("blip2train.data.inspection._RECORDS_PER_WORKER", 1)
    seen: list[tuple[int, int | None, int | None]] = []
    one = inspect(tmp_path, progress=lambda *done: seen.append(done)).to_json()
    two = inspect(tmp_path, workers=2).to_json()
    assert one == two
    assert one["num_unusable"] == 2
    assert [done for done, *_ in seen] == [5, 9, 12, 14]
    assert {total for _, total, _ in seen} == {14}


def test_limit_counts_records_in_the_order_of_the_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, [5, 5, 5], broken={7: b"broken", 8: b"broken"})
    inspection = inspect(tmp_path, limit=8)
    assert inspection.total("records") == 8
    assert found(inspection, "error") == {"corrupt_image": 1}


def test_tokens_are_counted_after_cleaning(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", record("x", captions=["a b c", "a, b. c! d", "a b c d e"]))
    seen: list[str] = []

    def count(texts: Any) -> list[int]:
        seen.extend(texts)
        return [2 + len(text.split()) for text in texts]

    inspection = inspect_shards([str(tmp_path / "s.tar")], CheckSettings(max_tokens=6), count_tokens=count)
    assert found(inspection, "warning") == {"long_caption_tokens": 1}
    assert seen == ["a b c", "a, b  c  d".replace("  ", " "), "a b c d e"]


def test_examples_are_printable_whatever_the_data_says(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", record("x", captions=["\x1b[2J\ud83d"]) + record("y", captions=["word\u202e " * 99]))
    inspection = inspect(tmp_path)
    assert found(inspection, "error", "warning") == {"bad_text": 1, "long_caption": 1}
    for examples in inspection.findings.examples.values():
        assert all(example.isprintable() and len(example) <= 300 for example in examples)
    json.dumps(inspection.to_json(), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("url", "source"),
    [
        ("data/coco/train-000012.tar", "coco/train"),
        ("data/cc3m/00012.tar", "cc3m"),
        ("https://host/laion/part_0003.tar?token=1", "laion/part"),
        ("shard-000001.tar", "shard"),
    ],
)
def test_source_is_folder_and_prefix(url: str, source: str) -> None:
    assert source_of(url) == source
