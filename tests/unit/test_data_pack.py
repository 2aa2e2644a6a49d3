"""What is packed can be read back; what is not packed is counted and named; interrupted work goes on."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shard_factory import encode, noise, plain

from blip2train.batch import EvalItem
from blip2train.data import pack
from blip2train.data.image_transform import decode_image
from blip2train.data.pack import pack_coco, pack_folder, pack_records, safe_key
from blip2train.data.sample import read_eval_items
from blip2train.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images in two folders, one of them with a dot in its name."""
    images = tmp_path / "images"
    for number in range(8):
        path = images / ("a" if number < 4 else "b.c") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(noise(number, 40, 60), "jpg"))
    return images


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def items(out: Path) -> list[EvalItem]:
    return list(read_eval_items(str(out), plain))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    return [{"image": name, "captions": [f"picture {name}"]} for name in names]


def test_a_folder_comes_back_from_its_shards_byte_by_byte(folder: Path, tmp_path: Path) -> None:
    captions = lines(tmp_path / "c.jsonl", rows_of(folder))
    manifest = pack_folder(folder, captions, tmp_path / "out", samples_per_shard=3)
    assert (manifest["num_records"], manifest["num_captions"], manifest["num_skipped"]) == (8, 8, 0)
    assert [row["num_records"] for row in manifest["shards"]] == [3, 3, 2]
    found = items(tmp_path / "out")
    assert [item.key for item in found] == [f"a/{n}" for n in range(4)] + [f"b_c/{n}" for n in range(4, 8)]
    for number, item in enumerate(found):
        original = decode_image(encode(noise(number, 40, 60), "jpg"))
        np.testing.assert_array_equal(item.image.numpy(), original.numpy())
    for row in manifest["shards"]:
        data = (tmp_path / "out" / row["name"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "index.json", "manifest.json", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar",
    ]  # fmt: skip


def test_the_shared_photographs_pack_as_they_are(shared_data: Path, tmp_path: Path) -> None:
    photos = shared_data / "photos"
    manifest = pack_folder(photos, photos / "captions.jsonl", tmp_path, validate_images=True)
    assert (manifest["num_records"], manifest["num_captions"], manifest["skipped"]) == (152, 760, {})
    found = {item.image_id: item for item in items(tmp_path)}
    rows = [json.loads(line) for line in (photos / "captions.jsonl").read_text().splitlines()]
    assert set(found) == {row["coco_id"] for row in rows}
    for row in rows:
        item = found[row["coco_id"]]
        assert list(item.captions) == row["captions"]
        assert item.extra["image_licence"] == row["image_licence"]
        assert [question.question for question in item.questions] == [entry["question"] for entry in row["qa"]]
        for question, entry in zip(item.questions, row["qa"], strict=True):
            assert set(question.answers) == set(entry.get("answers", entry.get("answer_scores")))


def test_other_field_names_merged_lines_and_extra_fields(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"file_name": "a/0.jpg", "caption": "one", "image_id": 5, "source": "web"},
        {"file_name": "a/0.jpg", "caption": "two"},
        {"file_name": "a/0.jpg", "caption": "one"},
        {"image": "a/1.jpg", "questions": [{"question": "What?", "answers": ["x"]}]},
    ]
    pack_folder(folder, lines(tmp_path / "c.jsonl", rows), tmp_path / "out")
    first, second = items(tmp_path / "out")
    assert (first.captions, first.image_id, first.extra) == (("one", "two"), 5, {"source": "web"})
    assert (second.captions, second.questions[0].answers) == ((), ("x",))


def test_everything_left_out_is_counted_and_named(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "broken.jpg").write_bytes(encode(noise(0, 40, 60), "jpg")[:300])
    (folder / "a" / "empty.jpg").write_bytes(b"")
    (folder / "a" / "words.jpg").write_text("not pixels")
    (folder / "a" / "0.png").write_bytes(encode(noise(1)))
    (folder / "readme.txt").write_text("hello")
    rows = [
        {"image": "a/0.jpg", "caption": "fine"},
        {"image": "a/0.png", "caption": "the same key"},
        {"image": "a/1.jpg", "caption": "  "},
        {"image": "a/2.jpg", "captions": []},
        {"image": "a/gone.jpg", "caption": "missing"},
        {"image": "a/broken.jpg", "caption": "cut off"},
        {"image": "a/empty.jpg", "caption": "no bytes"},
        {"image": "a/words.jpg", "caption": "no image"},
        {"image": "a/3.jpg", "caption": "fine", "qa": [{"question": "no answer?"}]},
        {"caption": "no name"},
        "{broken json\n",
        "\n",
        "[1, 2]\n",
    ]
    manifest = pack_folder(folder, lines(tmp_path / "c.jsonl", rows), tmp_path / "out", validate_images=True)
    assert manifest["num_records"] == 2
    assert manifest["skipped"] == {
        "duplicate_key": 1, "no_caption": 2, "missing_image": 1, "corrupt_image": 1, "empty_file": 1, "not_an_image": 2,
        "bad_question": 1, "bad_json": 3, "image_without_caption": 4,
    }  # fmt: skip
    examples = manifest["skipped_examples"]
    assert examples["missing_image"] == ["a/gone.jpg"]
    assert examples["image_without_caption"] == [f"b.c/{number}.jpg" for number in range(4, 8)]
    assert any("line 11" in example for example in examples["bad_json"])
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest


def test_large_images_shrink_and_small_ones_keep_their_bytes(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "small.png").write_bytes(encode(noise(0, 10, 12)))
    rows = [{"image": "a/0.jpg", "caption": "large"}, {"image": "a/small.png", "caption": "small"}]
    pack_folder(folder, lines(tmp_path / "c.jsonl", rows), tmp_path / "out", resize_short_side=20)
    large, small = items(tmp_path / "out")
    assert large.image.shape == (3, 20, 30)
    expected = Image.open(folder / "a" / "0.jpg").resize((30, 20), Image.Resampling.BICUBIC)
    difference = np.abs(large.image.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int))
    assert difference.mean() < 12  # JPEG of noise
    np.testing.assert_array_equal(small.image.permute(1, 2, 0).numpy(), noise(0, 10, 12))


def test_coco_annotations_are_packed_with_what_does_not_fit_counted(folder: Path, tmp_path: Path) -> None:
    content = {
        "images": [{"id": 10 + n, "file_name": f"{n}.jpg"} for n in range(3)] + [{"id": 99, "file_name": "gone.jpg"}],
        "annotations": [
            {"image_id": 11, "caption": "one"},
            {"image_id": 10, "caption": "zero"},
            {"image_id": 11, "caption": "one again"},
            {"image_id": 77, "caption": "of nothing"},
            {"image_id": 99, "caption": "gone"},
        ],
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    manifest = pack_coco(folder / "a", tmp_path / "c.json", tmp_path / "out")
    assert manifest["skipped"] == {"caption_without_image": 1, "no_caption": 1, "missing_image": 1}
    assert [(item.image_id, item.captions) for item in items(tmp_path / "out")] == [
        (10, ("zero",)), (11, ("one", "one again")),
    ]  # fmt: skip


def test_a_json_that_is_not_coco_says_what_is_needed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"images": [{"id": 1}]}')
    with pytest.raises(DataError, match=r"file_name"):
        pack_coco(folder, tmp_path / "c.json", tmp_path / "out")


def records(count: int, stop_at: int | None = None) -> Iterator[dict[str, Any]]:
    for number in range(count):
        if number == stop_at:
            raise KeyboardInterrupt
        fields = {"captions": [f"number {number}"], "image_id": number}
        yield {"key": f"k{number}", "image_bytes": encode(noise(number)), "extension": "png", "json": fields}


def test_records_in_memory_are_packed_with_progress(tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    manifest = pack_records(records(5), tmp_path, 2, total=5, progress=lambda done, total: calls.append((done, total)))
    assert manifest["num_records"] == 5 and len(manifest["shards"]) == 3
    assert calls == [(number, 5) for number in range(1, 6)]
    assert [item.image_id for item in items(tmp_path)] == list(range(5))


def test_an_interrupted_call_goes_on_after_the_last_whole_shard(tmp_path: Path) -> None:
    whole = pack_records(records(9), tmp_path / "whole", 2, source={"seed": 1})
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pack_records(records(9, stop_at=7), out, 2, source={"seed": 1})
    assert len(list(out.glob("*.tar"))) == 3 and not (out / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert pack_records(records(9), out, 2, source={"seed": 1}) == whole
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert not (out / ".pack_state.json").exists()


def test_an_interrupted_folder_keeps_its_counts(folder: Path, tmp_path: Path) -> None:
    rows = [{"image": "a/gone.jpg", "caption": "missing"}, *rows_of(folder), {"image": "a/gone2.jpg", "caption": "x"}]
    captions = lines(tmp_path / "c.jsonl", rows)

    def interrupt(done: int, total: int | None) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_folder(folder, captions, tmp_path / "out", samples_per_shard=2, progress=interrupt)
    manifest = pack_folder(folder, captions, tmp_path / "out", samples_per_shard=2)
    assert manifest == pack_folder(folder, captions, tmp_path / "again", samples_per_shard=2)
    assert manifest["skipped"] == {"missing_image": 2}


def test_a_finished_set_is_not_packed_again_and_another_one_is_refused(tmp_path: Path) -> None:
    first = pack_records(records(3), tmp_path, 2, source={"seed": 1})
    assert pack_records(iter(()), tmp_path, 2, source={"seed": 1}) == first
    for other in ({"source": {"seed": 2}}, {"source": None}, {"source": {"seed": 1}, "prefix": "p"}):
        with pytest.raises(DataError, match="another data set"):
            pack_records(records(3), tmp_path, 2, **other)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match="another data set"):
        pack_records(records(3), tmp_path, 2, source={"seed": 1})


def test_a_lost_shard_is_noticed(tmp_path: Path) -> None:
    pack_records(records(3), tmp_path, 2, source={"seed": 1})
    (tmp_path / "shard-000000.tar").unlink()
    with pytest.raises(DataError, match="another data set"):
        pack_records(records(3), tmp_path, 2, source={"seed": 1})


def test_too_little_disk_space_is_said_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = lines(tmp_path / "c.jsonl", rows_of(folder))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="not enough disk space"):
        pack_folder(folder, captions, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_is_a_data_error_and_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = pack.ShardWriter.write

    def full(self: pack.ShardWriter, key: str, *rest: Any) -> bool:
        if key == "k5":
            raise OSError(28, "No space left on device")
        return write(self, key, *rest)

    monkeypatch.setattr(pack.ShardWriter, "write", full)
    with pytest.raises(DataError, match="disk is full after"):
        pack_records(records(8), tmp_path, 2, source={"seed": 1})
    monkeypatch.undo()
    assert pack_records(records(8), tmp_path, 2, source={"seed": 1})["num_records"] == 8
    assert [item.image_id for item in items(tmp_path)] == list(range(8))


def test_nothing_to_pack_is_a_data_error_with_the_causes(folder: Path, tmp_path: Path) -> None:
    captions = lines(tmp_path / "c.jsonl", [{"image": "x.jpg", "caption": "gone"}])
    with pytest.raises(DataError, match=r"nothing was packed.*missing_image.: 1"):
        pack_folder(folder / "a", captions, tmp_path / "out")
    lines(captions, rows_of(folder / "a"))
    assert pack_folder(folder / "a", captions, tmp_path / "out")["num_records"] == 4
    with pytest.raises(DataError, match="nothing was packed"):
        pack_records([], tmp_path / "out2")


def test_missing_inputs_and_wrong_settings(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file or folder .*c\.jsonl"):
        pack_folder(folder, tmp_path / "c.jsonl", tmp_path / "out")
    captions = lines(tmp_path / "c.jsonl", rows_of(folder))
    with pytest.raises(ConfigError, match="resize_short_side"):
        pack_folder(folder, captions, tmp_path / "out", resize_short_side=0)
    with pytest.raises(ConfigError, match="samples_per_shard"):
        pack_folder(folder, captions, tmp_path / "out", samples_per_shard=0)


@pytest.mark.parametrize(
    ("name", "key"), [("a/b", "a/b"), ("a.b/c d", "a_b/c_d"), ("./x", "x"), ("__x__", "x"), ("é", "é")]
)
def test_keys_are_made_safe_for_tars(name: str, key: str) -> None:
    assert safe_key(name) == key
