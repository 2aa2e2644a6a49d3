"""Tables of captions and texts beside images become rows: every format, every name, every defect counted."""

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from blip2train.data.source.base import FileSlice, Folders, Row, Skipped, first_image_id, load
from blip2train.data.source.folder import FolderSource, TextBesideSource, find_captions
from blip2train.data.source.json_file import describe, iterate_list
from blip2train.data.source.merge import Entry, Merged
from blip2train.errors import ConfigError, DataError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three "images": readers do not look into them."""
    for name in ("a/0.jpg", "a/1.jpg", "b.c/2.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "images"


def records(source: Any) -> list[tuple[str, dict[str, Any], bytes] | str]:
    """What comes out of every row: (key, fields, image) or the cause why nothing does."""
    loaded = [(row, load(row)) for row in source.rows()]
    return [found if isinstance(found, str) else (row.key, *found) for row, found in loaded]


ROWS = [
    {"image": "a/0.jpg", "caption": "zero", "source": "web"},
    {"image": "a/1.jpg", "caption": "one"},
    {"image": "./a/0.jpg", "caption": "zero again"},
    {"image": "b.c/2.png", "caption": 'two, "quoted"'},
    {"image": "a/0.jpg", "caption": "zero"},
]
EXPECTED = [
    ("a/0", {"captions": ["zero", "zero again"], "source": "web"}, b"a/0.jpg"),
    ("a/1", {"captions": ["one"]}, b"a/1.jpg"),
    ("b_c/2", {"captions": ['two, "quoted"']}, b"b.c/2.png"),
]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=None), path)
    else:
        import csv

        with path.open("w", newline="") as file:
            names = list(rows[0])
            if path.suffix == ".csv":
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.write("\n".join(["\t".join(names), *("\t".join(row.get(n, "") for n in names) for row in rows)]))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_table_gives_the_same_rows(images: Path, tmp_path: Path, suffix: str) -> None:
    source = FolderSource(images, write_table(tmp_path / f"c{suffix}", ROWS))
    found = records(source)
    assert [row if isinstance(row, str) else (row[0], drop_none(row[1]), row[2]) for row in found] == EXPECTED
    assert source.count() == 3 and not source.skipped.counts
    assert records(source) == found


def drop_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def test_a_parquet_may_hold_lists_and_values_that_json_cannot(images: Path, tmp_path: Path) -> None:
    rows = [
        {"path": "a/0.jpg", "captions": ["one", " ", "two"], "score": float("nan"), "size": [1, 2], "raw": b"\x00"},
        {"path": "a/1.jpg", "captions": None, "score": 0.5, "size": None, "raw": None},
    ]
    source = FolderSource(images, write_table(tmp_path / "c.parquet", rows))
    first, second = records(source)
    assert first[1] == {"captions": ["one", "two"], "score": None, "size": [1, 2], "raw": "b'\\x00'"}
    json.dumps(first[1], allow_nan=False)
    assert second == "no_caption"


def test_columns_may_have_any_name_and_a_title_beside_a_caption_is_kept(images: Path, tmp_path: Path) -> None:
    named = write_table(tmp_path / "n.csv", [{"datei": "a/0.jpg", "satz": "eins", "title": "kept"}])
    source = FolderSource(images, named, image_column="datei", captions_column="satz")
    assert records(source) == [("a/0", {"captions": ["eins"], "title": "kept"}, b"a/0.jpg")]
    usual = write_table(tmp_path / "u.csv", [{"filepath": "a/0.jpg", "text": "one", "title": "kept"}])
    assert records(FolderSource(images, usual)) == [("a/0", {"captions": ["one"], "title": "kept"}, b"a/0.jpg")]


def test_a_missing_column_is_an_error_that_names_those_there(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column image or .*; the columns are: a, b[\s\S]*image_column="):
        list(FolderSource(images, write_table(tmp_path / "c.csv", [{"a": "1", "b": "2"}])).rows())
    with pytest.raises(DataError, match="no column x; the columns are: image"):
        list(FolderSource(images, write_table(tmp_path / "d.csv", [{"image": "1"}]), captions_column="x").rows())
    with pytest.raises(DataError, match="the columns are: nothing"):
        (tmp_path / "e.csv").write_text("")
        list(FolderSource(images, tmp_path / "e.csv").rows())
    with pytest.raises(DataError, match=r"captions in a \.xlsx file"):
        (tmp_path / "c.xlsx").write_text("")
        list(FolderSource(images, tmp_path / "c.xlsx").rows())
    with pytest.raises(DataError, match="no Parquet file"):
        (tmp_path / "c.parquet").write_text("words")
        list(FolderSource(images, tmp_path / "c.parquet").rows())


@pytest.mark.parametrize(
    "line", ["a very typical bus station\thttp://lh6.ggpht.com/-IvRtNLNcG8o/x.jpg", "caption\turl", "url\tcaption"]
)
def test_a_list_of_urls_is_sent_to_img2dataset(images: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "cc3m.tsv").write_text(f"{line}\nx\thttp://y/z.jpg\n")
    with pytest.raises(DataError, match=r"configs/data/dataset/cc3m.yaml"):
        list(FolderSource(images, tmp_path / "cc3m.tsv").rows())


def test_defects_of_a_csv_cost_a_line_each(images: Path, tmp_path: Path) -> None:
    lines = [b"\xef\xbb\xbfimage,caption", b"a/0.jpg,caf\xc3\xa9", b"a/1.jpg,caf\xe9", b"a/1.jpg,x,y", b"", b",none"]
    (tmp_path / "c.csv").write_bytes(b"\r\n".join([*lines, b'b.c/2.png,"two\r\nlines"', b"a/1.jpg," + b"w" * 200_000]))
    source = FolderSource(images, tmp_path / "c.csv")
    found = records(source)
    assert [row[1]["captions"] for row in found] == [["café"], ["two\r\nlines"], ["w" * 200_000]]
    assert dict(source.skipped.counts) == {"bad_text": 1, "bad_row": 2}
    assert any("line 4: 3 columns" in name for name in source.skipped.examples["bad_row"])


def test_tsv_takes_quotes_as_they_are(images: Path, tmp_path: Path) -> None:
    (tmp_path / "c.tsv").write_text('image\tcaption\na/0.jpg\t"an open quote\na/1.jpg\tnext\n')
    found = records(FolderSource(images, tmp_path / "c.tsv"))
    assert [row[1]["captions"] for row in found] == [['"an open quote'], ["next"]]


def test_jsonl_defects_questions_and_unused_images_are_counted(images: Path, tmp_path: Path) -> None:
    (images / "readme.txt").write_text("hello")
    (images / "out").mkdir()
    (images / "out" / "shard.tar").write_text("a shard")
    rows = [
        {"image": "a/0.jpg", "coco_id": 9, "qa": [{"question": "Q?", "answer_scores": {"x": 1, "y": 0.6}}]},
        {"image": "gone.jpg", "caption": "gone"},
        {"image": "a/1.jpg", "caption": "  ", "questions": [{"question": "no answer?"}]},
        {"caption": "no name"},
        {"image": "half \ud800 of a letter.jpg", "caption": "x"},
        {"image": "null \0.jpg", "caption": "x"},
        [1, 2],
    ]
    path = images / "captions.jsonl"
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode() + b"{broken\n\n\xff\n")
    assert find_captions(images) == path
    source = FolderSource(images, path, ignored=[images / "out"])
    first, gone, empty, null = records(source)
    question = {"question": "Q?", "answers": ["x", "x", "x", "y", "y"]}
    assert first == ("a/0", {"captions": [], "image_id": 9, "questions": [question]}, b"a/0.jpg")
    assert (gone, empty, null) == ("missing_image", "no_caption", "missing_image")
    counts = {"bad_text": 1, "bad_json": 4, "bad_question": 1, "image_without_caption": 1, "not_an_image": 1}
    assert dict(source.skipped.counts) == counts
    assert source.skipped.examples["image_without_caption"] == ["b.c/2.png"]


def test_images_beside_the_captions_are_found(images: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    captions = write_table(images / "c.jsonl", [{"image": "a/0.jpg", "caption": "zero"}])
    assert records(FolderSource(tmp_path / "elsewhere", captions))[0][2] == b"a/0.jpg"


def test_identity_follows_content_and_columns(images: Path, tmp_path: Path) -> None:
    path = write_table(tmp_path / "c.csv", [{"image": "a/0.jpg", "caption": "zero", "title": "t"}])
    before = FolderSource(images, path).identity()
    assert FolderSource(images, path, captions_column="title").identity() != before
    path.write_text(path.read_text().replace("zero", "one"))
    assert FolderSource(images, path).identity() != before


def test_a_text_or_a_json_beside_an_image_is_its_record(images: Path) -> None:
    (images / "a" / "0.txt").write_text("zero\n")
    (images / "a" / "0.json").write_text(json.dumps({"url": "u", "caption": None}))
    (images / "a" / "1.json").write_text(json.dumps({"captions": ["one", "uno"], "image_id": 4}))
    (images / "a" / "1.txt").write_text("not used: the JSON has captions")
    (images / "a" / "lost.txt").write_text("of nothing")
    (images / "b.c" / "Thumbs.db").write_text("")
    (images / "out").mkdir()
    (images / "out" / "manifest.json").write_text("{}")
    source = TextBesideSource(images, ignored=[images / "out"])
    identity = source.identity()
    assert source.count() == 2
    assert records(source) == [
        ("a/0", {"captions": ["zero"], "url": "u"}, b"a/0.jpg"),
        ("a/1", {"captions": ["one", "uno"], "image_id": 4}, b"a/1.jpg"),
    ]
    assert dict(source.skipped.counts) == {
        "caption_without_image": 1, "image_without_caption": 1, "not_an_image": 1
    }  # fmt: skip
    (images / "out" / "shard.tar").write_text("later")
    assert TextBesideSource(images, ignored=[images / "out"]).identity() == identity


def test_a_folder_without_any_text_says_what_to_give(images: Path) -> None:
    with pytest.raises(ConfigError, match="no captions for the images"):
        TextBesideSource(images)


@pytest.mark.parametrize(
    ("texts", "cause"),
    [
        ({"json": b"{broken"}, "bad_json"), ({"json": b"[1]"}, "bad_json"), ({"json": b"\xff\xfe1"}, "bad_json"),
        ({"txt": b"caf\xe9"}, "bad_text"), ({"txt": b" \n"}, "no_caption"),
    ],
)  # fmt: skip
def test_a_broken_text_is_the_cause(tmp_path: Path, texts: dict[str, bytes], cause: str) -> None:
    for kind, data in texts.items():
        (tmp_path / f"0.{kind}").write_bytes(data)
    row = Row("0", "0.jpg", {}, b"image", {kind: tmp_path / f"0.{kind}" for kind in texts})
    assert load(row) == cause


def test_an_image_may_be_empty_unreadable_or_a_place_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "all").write_bytes(b"0123456789")
    (tmp_path / "empty.jpg").write_bytes(b"")
    said = {"captions": ["x"]}
    assert load(Row("k", "n", said, FileSlice(tmp_path / "all", 3, 4))) == (said, b"3456")
    assert load(Row("k", "n", said, (tmp_path / "empty.jpg",))) == "empty_file"
    assert load(Row("k", "n", said, FileSlice(tmp_path / "gone", 0, 4))) == "unreadable_file"
    assert load(Row("k", "n", {}, b"image", needs_text=False)) == ({}, b"image")


def test_folders_try_every_place_and_names_give_ids(tmp_path: Path) -> None:
    (tmp_path / "val2014").mkdir()
    folders = Folders(tmp_path, ("train2014", "val2014"))
    assert folders.candidates("x.jpg") == (tmp_path / "x.jpg", tmp_path / "val2014" / "x.jpg")
    stems = ["COCO_val2014_000000000042", "000000000042", "4385058960_b0f291553e", "0013ea2087020901", "9" * 19]
    assert [first_image_id(stem) for stem in stems] == [42, 42, *stems[2:]]


def test_a_missing_image_is_not_replaced_by_one_of_the_same_name_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"another image")
    folders = Folders(tmp_path, ("val2014",))
    assert folders.candidates("a/1.jpg") == (tmp_path / "a" / "1.jpg",)
    assert folders.candidates("val2014/1.jpg") == (tmp_path / "val2014" / "1.jpg", tmp_path / "1.jpg")
    assert (folders.key("a/1.jpg"), folders.key("b/1.jpg"), folders.key("val2014/1.jpg")) == ("a/1", "b/1", "1")
    foreign = Folders(tmp_path, foreign=True)
    assert tmp_path / "a" / "1.jpg" in foreign.candidates("/export/a/1.jpg") and foreign.key("/export/a/1.jpg") == "a/1"
    assert tmp_path / "a" / "1.jpg" not in folders.candidates("/export/a/1.jpg")


def test_linked_folders_are_read_once_even_in_circles(images: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "9.jpg").write_bytes(b"nine")
    (tmp_path / "disk" / "9.txt").write_text("nine")
    (images / "link").symlink_to(tmp_path / "disk")
    (images / "a" / "up").symlink_to(images)
    source = TextBesideSource(images)
    assert records(source) == [("link/9", {"captions": ["nine"]}, b"nine")]
    assert dict(source.skipped.counts) == {"image_without_caption": 3}


def test_a_web_sized_table_is_not_held(tmp_path: Path) -> None:
    def read(skipped: Skipped) -> Iterator[Entry]:
        for number in range(50_000):
            yield f"image-{number}.jpg", {"captions": [f"caption {number} " + "x" * 200]}
        yield "image-7.jpg", {"captions": ["seven again"]}

    merged = Merged(read)
    tracemalloc.start()
    entries = sum(1 for _ in merged.entries(Skipped()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert entries == merged.count() == 50_000
    assert peak < 8e6  # the entries are 25 MB
    assert next(fields for name, fields in merged.entries(Skipped()) if name == "image-7.jpg")["captions"][1:] == [
        "seven again"
    ]


@pytest.mark.parametrize("chunk", [3, 7, 64])
def test_a_json_list_is_read_element_by_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    from blip2train.data.source import json_file

    monkeypatch.setattr(json_file, "_CHUNK", chunk)
    elements = [{"a": [1, "]", {"b": 'é"\\'}]}, 12345678, "x" * 100, None, [], -1.5e3]
    path = tmp_path / "l.json"
    path.write_text("\ufeff" + json.dumps(elements, indent=2), encoding="utf-8")
    assert list(iterate_list(path)) == elements
    path.write_text(" [ ] ")
    assert list(iterate_list(path)) == []
    path.write_text(json.dumps(elements)[:-20])
    with pytest.raises(DataError, match="cut off"):
        list(iterate_list(path))
    path.write_text('{"images": 1, "annotations": 2}')
    assert describe(path) == "an object with the keys images, annotations"
    with pytest.raises(DataError, match="an object with the keys images.* where a list is expected"):
        list(iterate_list(path))


def test_a_list_of_urls_is_cut_into_lines_as_the_recipe_for_laion_does(tmp_path: Path) -> None:
    elements = [{"caption": "é", "url": "u"}, {"caption": "two\nlines", "url": "v"}]
    (tmp_path / "l.json").write_text(json.dumps(elements))
    command = [sys.executable, "-m", "blip2train.data.source.json_file", str(tmp_path / "l.json")]
    done = subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert [json.loads(line) for line in done.stdout.splitlines()] == elements
