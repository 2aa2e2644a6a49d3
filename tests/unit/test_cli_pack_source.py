"""`source=` and what is given with it choose the reader; what does not go together is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from blip2train.cli.config import compose
from blip2train.cli.pack_source import SOURCES, open_source
from blip2train.errors import ConfigError, DataError

KARPATHY = {
    "images": [{"filename": "a.jpg", "split": split, "sentences": [{"raw": "x"}]} for split in ("train", "val")]
}
LAVIS = [{"image": "a.jpg", "caption": "x"}]
VQA = {
    "q.json": {"data_subtype": "val2014", "questions": [{"image_id": 1, "question": "?", "question_id": 7}]},
    "a.json": {
        "data_subtype": "val2014",
        "annotations": [
            {"question_id": 7, "image_id": 1, "answer_type": "other", "answers": [{"answer": "x", "answer_id": 1}]}
        ],
    },
}
FILES: dict[str, Any] = {
    "coco.json": {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]},
    "karpathy.json": KARPATHY,
    "lavis.json": LAVIS,
    "regions.json": [{"id": 1, "regions": [{"phrase": "x", "image_id": 1}]}],
    "qas.json": [{"id": 1, "qas": [{"qa_id": 3, "question": "?", "answer": "x", "image_id": 1}]}],
    "gqa.json": {"7": {"imageId": "1", "question": "?", "answer": "x"}},
    **VQA,
    "urls.txt": "http://host/a.jpg\n",
    "captions.txt": "x\n",
    "results.token": "a.jpg#0\tx\n",
    "table.csv": "picture,words\na.jpg,x\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


def given(folder: Path, *overrides: str) -> Any:
    return compose(
        "data_pack", [f"input={folder}", f"out={folder}/out", *(each.replace("@", f"{folder}/") for each in overrides)]
    )


@pytest.mark.parametrize(
    ("overrides", "reader"),
    [
        (["source=folder", "annotations=@table.csv", "image_column=picture", "captions_column=words"], "FolderSource"),
        (["source=coco", "annotations=@coco.json"], "CocoSource"),
        (["source=coco", "annotations=@lavis.json"], "LavisSource"),
        (["source=karpathy", "annotations=@karpathy.json", "split=train+val"], "KarpathySource"),
        (["source=karpathy", "annotations=@lavis.json"], "LavisSource"),
        (["source=flickr30k", "annotations=@karpathy.json", "split=val"], "KarpathySource"),
        (["source=flickr30k", "annotations=@results.token"], "Flickr30kTokenSource"),
        (["source=flickr30k", "annotations=@lavis.json"], "LavisSource"),
        (["source=nocaps", "annotations=@coco.json"], "CocoSource"),
        (["source=visual_genome", "annotations=@regions.json"], "VisualGenomeSource"),
        (["source=visual_genome", "annotations=@lavis.json"], "LavisSource"),
        (["source=vg_qa", "annotations=@qas.json"], "VisualGenomeSource"),
        (["source=vqav2", "annotations=[@q.json,@a.json]"], "VqaSource"),
        (["source=okvqa", "annotations=[@q.json,@a.json]"], "VqaSource"),
        (["source=gqa", "annotations=@gqa.json"], "GqaSource"),
        (["source=gqa", "annotations=[@gqa.json]"], "GqaSource"),
        (["source=sbu", "annotations=[@urls.txt,@captions.txt]"], "SbuSource"),
        (["source=sbu", "annotations=@lavis.json"], "LavisSource"),
    ],
)  # fmt: skip
def test_the_name_and_the_file_choose_the_reader(folder: Path, overrides: list[str], reader: str) -> None:
    source = open_source(given(folder, *overrides))
    assert type(source).__name__ == reader
    rows = list(source.rows())
    assert rows and all(row.fields.get("captions") == ["x"] or row.fields["questions"] for row in rows)
    expected = overrides[0].removeprefix("source=")
    assert source.identity()["kind"] == expected


@pytest.mark.parametrize("name", ["img2dataset", "cc3m", "cc12m", "laion", "coyo", "sbu"])
def test_what_img2dataset_wrote_is_read_under_every_name_it_has(name: str, tmp_path: Path) -> None:
    output = Path(__file__).resolve().parents[1] / "data" / "img2dataset" / "webdataset"
    source = open_source(compose("data_pack", [f"input={output}", f"out={tmp_path}", f"source={name}"]))
    assert source.identity()["kind"] == name and list(source.rows())


def test_a_folder_finds_its_captions_and_leaves_out_the_shards_below_it(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(b"x")
    (folder / "out").mkdir()
    (folder / "out" / "shard-000000.tar").write_bytes(b"x")
    (folder / "captions.jsonl").write_text('{"image": "a.jpg", "caption": "x"}\n')
    source = open_source(given(folder))
    assert [row.key for row in source.rows()] == ["a"]
    assert not any("shard" in name for names in source.skipped.examples.values() for name in names)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source=imagenet"], "unknown source 'imagenet'"),
        (["source=coco"], "annotations is not set"),
        (["source=coco", "annotations=@coco.json", "split=val"], "split=val is not read"),
        (["source=laion", "annotations=@coco.json"], "is not read.*\n.*\n.*it reads input"),
        (["source=coco", "annotations=[@coco.json,@lavis.json]"], "with 2 files"),
        (["source=karpathy", "annotations=@karpathy.json"], "no split"),
        (["source=flickr30k", "annotations=@results.token", "split=val"], "results.token does not know"),
        (["source=karpathy", "annotations=@lavis.json", "split=val"], "a list of one split"),
        (["source=folder"], "no captions for the images"),
        (["source=folder", "image_column=x"], "without a file"),
        (["annotations=[]", "source=coco"], "annotations is not set"),
        (["source=coco", "annotations=@coco.json", "input=@out"], "shards among the files"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said(folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_source(given(folder, *overrides))


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"folder"}))
def test_another_file_than_the_official_one_is_said(folder: Path, name: str) -> None:
    (folder / "other.json").write_text('{"somebody": "else"}')
    takes_files = "annotations" in (*SOURCES[name].needs, *SOURCES[name].takes)
    overrides = ["annotations=@other.json"] if takes_files else []
    with pytest.raises(DataError, match=r"fix:"):
        list(open_source(given(folder, f"source={name}", *overrides)).rows())
