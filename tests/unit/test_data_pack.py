"""What is packed can be read back; what is not packed is counted and named; interrupted work goes on."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_world import SETTINGS, ListSource, contents, write_images
from shard_factory import encode, noise, plain

from blip2train.batch import EvalItem
from blip2train.data.image_transform import decode_image
from blip2train.data.pack import pack, pack_records
from blip2train.data.pack_worker import PackSettings
from blip2train.data.sample import read_eval_items
from blip2train.data.source.base import Row
from blip2train.data.source.folder import FolderSource, TextBesideSource
from blip2train.data.tar_shard import TarShard
from blip2train.errors import ConfigError, DataError

PLAIN = PackSettings(samples_per_shard=3)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Nine rows with all their images."""
    folder = tmp_path / "images"
    write_images(folder, 9)
    return [row for row in write_images(folder, 9) if row.key != "k6"]


def items(out: Path) -> list[EvalItem]:
    return list(read_eval_items(str(out), plain))


def test_images_come_back_from_their_shards_byte_by_byte(rows: list[Row], tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = pack(ListSource(rows), out, PLAIN)
    assert (manifest["num_records"], manifest["num_captions"], manifest["num_skipped"]) == (8, 8, 0)
    assert [row["num_records"] for row in manifest["shards"]] == [3, 3, 2]
    found = items(out)
    assert [item.key for item in found] == [row.key for row in rows]
    for row, item in zip(rows, found, strict=True):
        original = decode_image(encode(noise(int(row.key[1:]), 40, 60), "jpg"))
        np.testing.assert_array_equal(item.image.numpy(), original.numpy())
    for row in manifest["shards"]:
        data = (out / row["name"]).read_bytes()
        assert (row["sha256"], row["num_bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert sorted(path.name for path in out.iterdir()) == [
        "index.json", "manifest.json", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar",
    ]  # fmt: skip


def test_the_shared_photographs_pack_as_they_are(shared_data: Path, tmp_path: Path) -> None:
    photos = shared_data / "photos"
    manifest = pack(FolderSource(photos, photos / "captions.jsonl"), tmp_path, PackSettings(validate_images=True))
    assert (manifest["num_records"], manifest["num_captions"], manifest["skipped"]) == (152, 760, {})
    found = {item.image_id: item for item in items(tmp_path)}
    lines = [json.loads(line) for line in (photos / "captions.jsonl").read_text().splitlines()]
    assert set(found) == {row["coco_id"] for row in lines}
    for row in lines:
        item = found[row["coco_id"]]
        assert list(item.captions) == row["captions"]
        assert item.extra["image_licence"] == row["image_licence"]
        assert [question.question for question in item.questions] == [entry["question"] for entry in row["qa"]]


def test_file_names_that_are_no_text_are_packed_or_named_like_others(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, has_text in (("\udc80", True), ("a\udcff", True), ("\udc81", False)):
        (images / f"{name}.png").write_bytes(encode(noise(1)))
        if has_text:
            (images / f"{name}.txt").write_text("a cat")
    manifest = pack(TextBesideSource(images), tmp_path / "out", PLAIN)
    assert sorted(item.key for item in items(tmp_path / "out")) == ["237_178_128", "a"]
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert found == json.loads(json.dumps(manifest)) and "\\udc81.png" in json.dumps(found)
    assert pack(TextBesideSource(images), tmp_path / "out", PLAIN) == found  # finished, and known to be the same


def test_what_is_left_out_is_counted_named_and_listed(tmp_path: Path) -> None:
    all_rows = write_images(tmp_path / "images", 24)
    all_rows[5] = Row("k0", "./0.jpg", {"captions": ["the first image again"]}, all_rows[0].image)
    all_rows[8] = Row("k8", "8.jpg", {"captions": ["\ud800"]}, all_rows[8].image)
    out = tmp_path / "out"
    manifest = pack(ListSource(all_rows, bad_lines=30), out, SETTINGS)
    assert manifest["skipped"] == {
        "bad_json": 30, "bad_text": 1, "corrupt_image": 2, "duplicate_key": 1, "missing_image": 3,
    }  # fmt: skip
    assert manifest["num_records"] == 24 - 7 and manifest["num_rows"] == 23
    assert manifest["skipped_examples"]["missing_image"] == ["6.jpg", "13.jpg", "20.jpg"]
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [row["name"] for row in listed[:30]] == [f"line {number}" for number in range(30)]
    assert listed[30] == {"cause": "duplicate_key", "name": "./0.jpg"}
    assert [row["name"] for row in listed[31:]] == ["6.jpg", "8.jpg", "10.jpg", "13.jpg", "20.jpg", "21.jpg"]
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert len(items(out)) == 17


def test_images_of_one_key_are_all_packed(tmp_path: Path) -> None:
    """The first keeps its key; so does every image of a set without such names."""
    names = ["a b.jpg", "a,b.jpg", "c.jpg", "c.png", "plain.jpg", "d/e.jpg"]
    images = {name: encode(noise(number, 40, 60), name[-3:]) for number, name in enumerate(names)}
    lines = []
    for name, image in images.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(image)
        lines.append(json.dumps({"image": name, "caption": name}) + "\n")
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(lines))
    for size, workers in ((1, 2), (4, 1), (1000, 1)):
        out = tmp_path / f"out-{size}"
        manifest = pack(FolderSource(tmp_path / "images", captions), out, PackSettings(size), workers=workers)
        assert manifest["skipped"] == {} and manifest["notes"] == {"keys_with_a_hash": 2}
        suffixes = [hashlib.blake2b(name.encode(), digest_size=4).hexdigest() for name in ("a,b.jpg", "c.png")]
        found = items(out)
        assert [item.key for item in found] == ["a_b", f"a_b-{suffixes[0]}", "c", f"c-{suffixes[1]}", "plain", "d/e"]
        for item, (name, image) in zip(found, images.items(), strict=True):
            assert item.captions == (name,)
            np.testing.assert_array_equal(item.image.numpy(), decode_image(image).numpy())
        assert len({item.image_id for item in found}) == len(names)


def test_the_manifest_says_what_is_in_the_shards(rows: list[Row], tmp_path: Path) -> None:
    question = {"question": "What?", "answers": ["x"]}
    rows[0] = Row("q", "q", {"questions": [question], "captions": ["one two three"]}, rows[0].image)
    manifest = pack(ListSource(rows), tmp_path / "out", SETTINGS)
    assert manifest["source"] == {"kind": "list"} and manifest["settings"]["resize_short_side"] == 20
    assert (manifest["num_captions"], manifest["num_questions"]) == (8, 1)
    assert manifest["caption_words"] == {"2": 7, "3": 1}
    assert (manifest["short_sides"], manifest["formats"]) == ({"0": 8}, {"jpg": 8})
    assert manifest["notes"] == {"failed_downloads": {"404": 3}}
    assert manifest["made"]["versions"]["blip2train"]


def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    all_rows = write_images(tmp_path / "images", 30)
    calls: list[tuple[int, int | None, int]] = []
    pack(ListSource(all_rows), tmp_path / "one", SETTINGS, workers=1)
    pack(ListSource(all_rows), tmp_path / "two", SETTINGS, workers=2, progress=lambda *call: calls.append(call))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert calls[0] == (0, 30, 0) and calls[-1][:2] == (30, 30) and calls[-1][2] > 0


def test_progress_counts_every_row(rows: list[Row], tmp_path: Path) -> None:
    calls: list[int] = []
    pack(ListSource(rows), tmp_path / "out", PLAIN, progress=lambda done, total, num_bytes: calls.append(done))
    assert calls == list(range(9))


def test_an_interrupted_call_goes_on_after_its_whole_shards(tmp_path: Path) -> None:
    all_rows = write_images(tmp_path / "images", 22)
    whole, out = tmp_path / "whole", tmp_path / "out"
    pack(ListSource(all_rows), whole, SETTINGS)
    for stop_before in (3, 4, 13, 22):
        source = ListSource(all_rows)
        source.stop_before = stop_before
        if stop_before < 22:
            with pytest.raises(KeyboardInterrupt):
                pack(source, out, SETTINGS)
            assert len(list(out.glob("*.tar"))) == stop_before // 4 and not (out / "manifest.json").exists()
            assert not list(out.rglob("*.partial"))
        kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    pack(ListSource(all_rows), out, SETTINGS)
    assert contents(out) == contents(whole)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert not (out / ".pack").exists()


def test_what_a_kill_leaves_is_made_good(tmp_path: Path) -> None:
    all_rows = write_images(tmp_path / "images", 22)
    whole, out = tmp_path / "whole", tmp_path / "out"
    pack(ListSource(all_rows), whole, SETTINGS)
    source = ListSource(all_rows)
    source.stop_before = 17
    with pytest.raises(KeyboardInterrupt):
        pack(source, out, SETTINGS)
    log = out / ".pack" / "finished.jsonl"
    log.write_bytes(log.read_bytes()[:-30])  # killed while the last line was written
    (out / ".pack" / "shard-000004.tar.partial").write_bytes(b"half a shard")
    (out / "shard-000001.tar").unlink()
    (out / "shard-000002.tar").write_bytes(b"cut")
    pack(ListSource(all_rows), out, SETTINGS)
    assert contents(out) == contents(whole)


def test_a_source_that_changed_since_is_noticed(rows: list[Row], tmp_path: Path) -> None:
    source = ListSource(rows)
    source.stop_before = 4
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", PLAIN)
    with pytest.raises(DataError, match="rows of shard 0 are not those"):
        pack(ListSource(rows[1:]), tmp_path / "out", PLAIN)


def test_a_finished_set_is_not_packed_again_and_another_one_is_refused(rows: list[Row], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = pack(ListSource(rows), out, PLAIN)
    assert pack(ListSource([]), out, PLAIN, workers=2) == first
    with pytest.raises(DataError, match="another data set"):
        pack(ListSource(rows, "other"), out, PLAIN)
    with pytest.raises(DataError, match="another data set"):
        pack(ListSource(rows), out, SETTINGS)
    (out / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"1 of the 3 shards packed here are gone.*000001"):
        pack(ListSource(rows), out, PLAIN)
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match="another data set"):
        pack(ListSource(rows), out, PLAIN)


def test_an_interrupted_call_is_not_continued_as_another_one(rows: list[Row], tmp_path: Path) -> None:
    source = ListSource(rows)
    source.stop_before = 4
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", PLAIN)
    with pytest.raises(DataError, match="interrupted call with another source"):
        pack(ListSource(rows, "other"), tmp_path / "out", PLAIN)


def test_only_one_call_at_a_time_packs_into_a_folder(rows: list[Row], tmp_path: Path) -> None:
    class Nested(ListSource):
        def rows(self) -> Iterator[Row]:
            pack(ListSource(rows), tmp_path / "out", PLAIN)
            yield from ()

    with pytest.raises(DataError, match="another process is packing"):
        pack(Nested([]), tmp_path / "out", PLAIN)


def test_too_much_left_out_ends_the_work_as_soon_as_it_is_certain(tmp_path: Path) -> None:
    all_rows = write_images(tmp_path / "images", 40)
    for row in all_rows[:12]:
        (tmp_path / "images" / row.name).unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"12 of 40 rows are left out \(12 missing_image\); max_skipped_share is 0.2"):
        pack(ListSource(all_rows), tmp_path / "out", SETTINGS, max_skipped_share=0.2)
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = pack(ListSource(all_rows), tmp_path / "out", SETTINGS, max_skipped_share=0.5)
    assert manifest["skipped"]["missing_image"] == 12 + 4


def test_a_disk_too_small_is_said_before_it_is_full(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match="not enough disk space"):
        pack(ListSource(rows), tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=(64 << 20) + 5000))
    with pytest.raises(DataError, match="not enough disk space"):
        pack(ListSource(rows), tmp_path / "out", PLAIN)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 1
    monkeypatch.undo()
    assert pack(ListSource(rows), tmp_path / "out", PLAIN)["num_records"] == 8


def test_a_disk_that_fills_up_is_a_data_error_and_can_be_continued(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = TarShard.write

    def full(self: TarShard, key: str, files: Any) -> None:
        if key == "k5":
            raise OSError(28, "No space left on device")
        write(self, key, files)

    monkeypatch.setattr(TarShard, "write", full)
    with pytest.raises(DataError, match="disk is full after 3 rows"):
        pack(ListSource(rows), tmp_path / "out", PLAIN)
    monkeypatch.undo()
    assert pack(ListSource(rows), tmp_path / "out", PLAIN)["num_records"] == 8


def test_a_file_in_the_place_of_the_folder_is_said(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="no folder can be made"):
        pack(ListSource(rows), tmp_path / "out", PLAIN)


def test_nothing_to_pack_is_a_data_error_with_the_causes(tmp_path: Path) -> None:
    gone = [Row("a", "x.jpg", {"captions": ["gone"]}, (tmp_path / "x.jpg",))]
    with pytest.raises(DataError, match=r"nothing was packed.*missing_image.: 1"):
        pack(ListSource(gone), tmp_path / "out")
    with pytest.raises(DataError, match="nothing was packed"):
        pack_records([], tmp_path / "out2")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("resize_short_side", 0), ("samples_per_shard", 0), ("jpeg_quality", 101), ("reencode", "png"),
        ("prefix", "a/b"), ("max_pixels", 0), ("samples_per_shard", "many"), ("validate_images", "yes"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        PackSettings(**{setting: value})


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"workers": "all"}, {"max_skipped_share": 1.5}])
def test_an_argument_out_of_range_is_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        pack(ListSource([]), tmp_path / "out", **arguments)


def records(count: int, stop_at: int | None = None) -> Iterator[dict[str, Any]]:
    for number in range(count):
        if number == stop_at:
            raise KeyboardInterrupt
        fields = {"captions": [f"number {number}"], "image_id": number}
        yield {"key": f"k{number}", "image_bytes": encode(noise(number)), "json": fields}


def test_records_in_memory_are_packed_and_continued(tmp_path: Path) -> None:
    whole = pack_records(records(9), tmp_path / "whole", 2, source={"seed": 1}, total=9)
    assert whole["num_records"] == 9 and [item.image_id for item in items(tmp_path / "whole")] == list(range(9))
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pack_records(records(9, stop_at=7), out, 2, source={"seed": 1})
    assert len(list(out.glob("*.tar"))) == 3
    pack_records(records(9), out, 2, source={"seed": 1})
    assert contents(out) == contents(tmp_path / "whole")


def test_records_without_an_identity_are_never_taken_for_finished(tmp_path: Path) -> None:
    pack_records(records(3), tmp_path / "out", 2)
    with pytest.raises(DataError, match="another data set"):
        pack_records(records(3), tmp_path / "out", 2)
