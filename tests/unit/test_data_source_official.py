"""Small files in the official layouts, field for field, become the rows that training and the benchmarks read."""

import json
from pathlib import Path
from typing import Any

import pytest

from blip2train.batch import to_image_id
from blip2train.data.pack import pack
from blip2train.data.sample import read_eval_items
from blip2train.data.source.base import Row, Source, load
from blip2train.data.source.coco import COCO_FOLDERS, NOCAPS_FOLDERS, CocoSource
from blip2train.data.source.flickr30k import Flickr30kTokenSource
from blip2train.data.source.gqa import GqaSource
from blip2train.data.source.karpathy import FLICKR_FOLDERS, KarpathySource
from blip2train.data.source.lavis import LavisSource, is_lavis_list
from blip2train.data.source.sbu import SbuSource
from blip2train.data.source.visual_genome import VISUAL_GENOME_FOLDERS, VISUAL_GENOME_ID, VisualGenomeSource
from blip2train.data.source.vqa import VqaSource
from blip2train.errors import ConfigError, DataError


def put(folder: Path, *names: str) -> Path:
    """ "Images" whose bytes are their path: readers do not look into them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def read(source: Source) -> list[Any]:
    """(key, fields, where the image was found) per row, or why there is no record; twice, to be sure of the order."""
    found = [(row.key, loaded) for row in source.rows() for loaded in [load(row)]]
    assert [(row.key, load(row)) for row in source.rows()] == found
    assert source.count() in (None, len(found))
    json.dumps(source.identity())
    return [
        (key, loaded[0], loaded[1].decode()) if isinstance(loaded, tuple) else (key, loaded) for key, loaded in found
    ]


def coco_image(image_id: int, name: str) -> dict[str, Any]:
    return {
        "license": 5, "file_name": name, "coco_url": f"http://images.cocodataset.org/train2014/{name}", "height": 480,
        "width": 640, "date_captured": "2013-11-14 16:28:13", "flickr_url": "http://farm4.staticflickr.com/3/2.jpg",
        "id": image_id,
    }  # fmt: skip


COCO_EXTRA = {
    "license": 5, "original_height": 480, "original_width": 640, "date_captured": "2013-11-14 16:28:13",
    "flickr_url": "http://farm4.staticflickr.com/3/2.jpg",
}  # fmt: skip


def test_coco_2014_finds_its_images_under_either_name(tmp_path: Path) -> None:
    names = ["COCO_train2014_000000057870.jpg", "COCO_train2014_000000475546.jpg", "COCO_train2014_000000000001.jpg"]
    images = put(tmp_path / "coco", f"train2014/{names[0]}", "val2017/000000475546.jpg")
    content = {
        "info": {"description": "COCO 2014 Dataset", "year": 2014},
        "images": [coco_image(int(name[-16:-4]), name) for name in names],
        "licenses": [{"url": "http://creativecommons.org/licenses/by-nc-sa/2.0/", "id": 1, "name": "x"}],
        "annotations": [
            {"image_id": 475546, "id": 1, "caption": "second"},
            {"image_id": 57870, "id": 2, "caption": "first"},
            {"image_id": 475546, "id": 3, "caption": "second again "},
            {"image_id": 1, "id": 4, "caption": "no such file"},
            {"image_id": 1, "id": 5, "caption": " "},
            {"image_id": 77, "id": 6, "caption": "of nothing"},
        ],
    }
    source = CocoSource(images, save(tmp_path / "captions_train2014.json", content))
    first, second, third = read(source)
    url = content["images"][0]["coco_url"]
    assert first == (
        "COCO_train2014_000000057870",
        {"captions": ["first"], "image_id": 57870, "coco_url": url, **COCO_EXTRA},
        f"train2014/{names[0]}",
    )
    assert second[1]["captions"] == ["second", "second again "] and second[2] == "val2017/000000475546.jpg"
    assert third == ("COCO_train2014_000000000001", "missing_image")
    assert dict(source.skipped.counts) == {"caption_without_image": 1, "empty_caption": 1}


def test_nocaps_keeps_its_ids_and_domains_and_its_test_set_has_no_captions(tmp_path: Path) -> None:
    images = put(tmp_path, "val/0013ea2087020901.jpg", "val/0015c0b2b0e04c7e.jpg")
    rows = [
        {
            "license": 0, "file_name": f"{name}.jpg", "coco_url": f"https://s3.amazonaws.com/nocaps/val/{name}.jpg",
            "height": 1024, "width": 732, "date_captured": "2018-11-06 11:04:33", "open_images_id": name, "id": index,
            "domain": domain,
        }
        for index, (name, domain) in enumerate([("0013ea2087020901", "in-domain"), ("0015c0b2b0e04c7e", "near-domain")])
    ]  # fmt: skip
    captions = [{"image_id": i % 2, "id": i, "caption": f"caption {i}"} for i in range(4)]
    content = {"licenses": [], "info": {"year": 2018}, "images": rows, "annotations": captions}
    path = save(tmp_path / "nocaps_val_4500_captions.json", content)
    first, second = read(CocoSource(images, path, kind="nocaps", subfolders=NOCAPS_FOLDERS))
    assert first[1] == {
        "captions": ["caption 0", "caption 2"], "image_id": 0, "license": 0, "original_height": 1024,
        "original_width": 732, "date_captured": "2018-11-06 11:04:33", "open_images_id": "0013ea2087020901",
        "domain": "in-domain", "coco_url": "https://s3.amazonaws.com/nocaps/val/0013ea2087020901.jpg",
    }  # fmt: skip
    assert (second[0], second[1]["domain"]) == ("0015c0b2b0e04c7e", "near-domain")
    del content["annotations"]
    path = save(tmp_path / "nocaps_test_image_info.json", content)
    assert [row[1]["captions"] for row in read(CocoSource(images, path, subfolders=NOCAPS_FOLDERS))] == [[], []]


def karpathy_image(number: int, split: str, **more: Any) -> dict[str, Any]:
    sentences = [
        {"tokens": ["a", "man"], "raw": f"A man {number}.", "imgid": number, "sentid": number * 2 + place}
        for place in range(2)
    ]
    return {
        "sentids": [number * 2, number * 2 + 1], "imgid": number, "sentences": sentences, "split": split, **more
    }  # fmt: skip


def test_karpathy_coco_is_read_split_by_split(tmp_path: Path) -> None:
    splits = ["train", "restval", "val", "test", "train"]
    names = [f"COCO_val2014_{100 + n:012d}.jpg" for n in range(5)]
    content = {
        "images": [
            karpathy_image(n, split, filepath="val2014", filename=names[n], cocoid=100 + n)
            for n, split in enumerate(splits)
        ],
        "dataset": "coco",
    }
    images = put(tmp_path, *(f"images/val2014/{name}" for name in names))
    path = save(tmp_path / "dataset_coco.json", content)
    found = read(KarpathySource(images, path, split="train+restval"))
    assert [(key, fields["image_id"], fields["split"]) for key, fields, _ in found] == [
        (names[0][:-4], 100, "train"), (names[1][:-4], 101, "restval"), (names[4][:-4], 104, "train"),
    ]  # fmt: skip
    assert found[1][1]["captions"] == ["A man 1.", "A man 1."] and found[1][2] == f"images/val2014/{names[1]}"
    with pytest.raises(ConfigError, match=r"split=dev[\s\S]*train \(2 images\), restval \(1 images\), val"):
        KarpathySource(images, path, split="dev")
    with pytest.raises(ConfigError, match="no split"):
        KarpathySource(images, path)


def test_flickr30k_has_one_id_per_photograph_in_all_its_files(tmp_path: Path) -> None:
    images = put(tmp_path / "f", "flickr30k-images/1000092795.jpg")
    content = {"images": [karpathy_image(0, "test", filename="1000092795.jpg")], "dataset": "flickr30k"}
    karpathy = KarpathySource(images, save(tmp_path / "dataset_flickr30k.json", content), split="test", kind="x")
    token = tmp_path / "results_20130124.token"
    token.write_bytes(b"1000092795.jpg#0\tTwo guys .\n1000092795.jpg#1\tThree\ttabs .\nno caption\n1.jpg#0\t\xff\n")
    official = Flickr30kTokenSource(images, token)
    rows = [{"image": "flickr30k-images/1000092795.jpg", "caption": ["one", "two"]}]
    lavis = LavisSource(
        images, save(tmp_path / "flickr30k_test.json", rows), kind="flickr30k", subfolders=FLICKR_FOLDERS
    )
    found = [read(source) for source in (karpathy, official, lavis)]
    assert [row[0][0] for row in found] == ["1000092795"] * 3
    assert [row[0][1]["image_id"] for row in found] == [1000092795] * 3
    assert [row[0][2] for row in found] == ["flickr30k-images/1000092795.jpg"] * 3
    assert found[1][0][1]["captions"] == ["Two guys .", "Three\ttabs ."]
    assert dict(official.skipped.counts) == {"bad_row": 1, "bad_text": 1}
    with pytest.raises(DataError, match="NAME.jpg#0"):
        Flickr30kTokenSource(images, save(tmp_path / "wrong.token", [1]))


def test_the_lists_of_blip_join_the_captions_of_an_image(tmp_path: Path) -> None:
    images = put(tmp_path, "val2014/COCO_val2014_000000522418.jpg", "train2014/COCO_train2014_000000000009.jpg")
    rows = [
        {"caption": "A woman cutting a cake.", "image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_1"},
        {"caption": "food", "image": "train2014/COCO_train2014_000000000009.jpg", "image_id": "coco_2"},
        {"caption": "A cake.", "image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_1"},
        {"caption": "nameless"},
    ]
    source = LavisSource(
        images, save(tmp_path / "coco_karpathy_train.json", rows), kind="coco", subfolders=COCO_FOLDERS
    )
    first, second = read(source)
    assert first[:2] == (
        "COCO_val2014_000000522418",
        {"captions": ["A woman cutting a cake.", "A cake."], "image_id": 522418},
    )
    assert second[1]["image_id"] == 9 and dict(source.skipped.counts) == {"bad_json": 1}
    nocaps = [{"image": "val/0013ea2087020901.jpg", "caption": ["a", "b"], "img_id": 0, "domain": "in-domain"}]
    (row,) = read(LavisSource(put(tmp_path, "val/0013ea2087020901.jpg"), save(tmp_path / "n.json", nocaps), kind="n"))
    assert row[1] == {"captions": ["a", "b"], "image_id": 0, "domain": "in-domain"}


def test_the_lists_of_blip_hold_questions_and_paths_of_other_machines(tmp_path: Path) -> None:
    images = put(tmp_path, "val2014/COCO_val2014_000000262148.jpg", "VG_100K/2.jpg")
    rows = [
        {"dataset": "vqa", "image": "val2014/COCO_val2014_000000262148.jpg", "question": f"Q{n}?", "question_id": n,
         "answer": ["down"] * 9 + ["up"]}
        for n in range(2)
    ]  # fmt: skip
    (row,) = read(LavisSource(images, save(tmp_path / "vqa_val.json", rows), kind="vqav2"))
    assert row[1]["questions"][1] == {"question": "Q1?", "answers": ["down"] * 9 + ["up"], "question_id": "1"}
    assert row[1]["image_id"] == 262148
    rows = [{"image": "/export/share/visual-genome/VG_100K/2.jpg", "caption": c} for c in ("a", "b")]
    arguments = {"kind": "visual_genome", "subfolders": VISUAL_GENOME_FOLDERS, "id_prefix": VISUAL_GENOME_ID}
    (row,) = read(LavisSource(images, save(tmp_path / "vg_caption.json", rows), **arguments))
    assert row == ("2", {"captions": ["a", "b"], "image_id": "vg/2"}, "VG_100K/2.jpg")


def region(region_id: int, phrase: str) -> dict[str, Any]:
    return {
        "region_id": region_id, "width": 82, "height": 139, "image_id": 1, "phrase": phrase, "y": 57, "x": 421,
    }  # fmt: skip


def test_visual_genome_regions_are_captions_of_their_image(tmp_path: Path) -> None:
    images = put(tmp_path, "VG_100K_2/1.jpg", "VG_100K/2.jpg")
    content = [
        {"regions": [region(1, "the clock is green"), region(2, "shade "), region(3, "shade"), region(4, "")], "id": 1},
        {"image_id": 2, "regions": [region(5, "walk sign")]},
        {"regions": [], "id": 3},
        {"id": 4},
    ]
    source = VisualGenomeSource(images, save(tmp_path / "region_descriptions.json", content), part="regions")
    assert read(source) == [
        ("1", {"captions": ["the clock is green", "shade"], "image_id": "vg/1", "visual_genome_id": 1},
         "VG_100K_2/1.jpg"),
        ("2", {"captions": ["walk sign"], "image_id": "vg/2", "visual_genome_id": 2}, "VG_100K/2.jpg"),
        ("3", "no_caption"),
    ]  # fmt: skip
    assert dict(source.skipped.counts) == {"bad_json": 1}


def test_visual_genome_questions_and_gqa_agree_on_the_image(tmp_path: Path) -> None:
    images = put(tmp_path, "VG_100K/2405722.jpg", "images/n161313.jpg")
    qas = [
        {"a_objects": [], "question": "What color is the clock?", "image_id": 2405722, "qa_id": 986769,
         "answer": "Green.", "q_objects": []},
        {"a_objects": [], "question": "", "image_id": 2405722, "qa_id": 2, "answer": "x", "q_objects": []},
    ]  # fmt: skip
    path = save(tmp_path / "question_answers.json", [{"id": 2405722, "qas": qas}])
    source = VisualGenomeSource(images, path, part="qas")
    (genome,) = read(source)
    assert genome[1]["questions"] == [
        {"question_id": "986769", "question": "What color is the clock?", "answers": ["Green."], "kind": "what"}
    ]
    assert dict(source.skipped.counts) == {"bad_question": 1}
    question = {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}], "entailed": ["05515937"],
        "equivalent": ["05515938"], "question": "What is this bird called?", "imageId": "2405722", "isBalanced": True,
        "groups": {"global": "bird", "local": "11q-bird"}, "answer": "parrot", "semanticStr": "select: bird (329774)",
        "annotations": {"answer": {"0": "329774"}, "question": {"3": "329774"}, "fullAnswer": {"3": "329774"}},
        "types": {"detailed": "categoryThis", "semantic": "cat", "structural": "query"},
        "fullAnswer": "This is a parrot.",
    }  # fmt: skip
    test = {"question": "Is it overcast?", "imageId": "n161313", "isBalanced": True}
    content = {"05515938": question, "201307251": test, "05515939": question | {"question": "Again?"}}
    path = save(tmp_path / "testdev_balanced_questions.json", content)
    first, second = read(GqaSource(images, [path]))
    assert first[2] == "VG_100K/2405722.jpg" and second[2] == "images/n161313.jpg"
    assert first[1]["questions"][0] == {
        "question_id": "05515938", "question": "What is this bird called?", "answers": ["parrot"], "kind": "query",
        "full_answer": "This is a parrot.",
    }  # fmt: skip
    assert len(first[1]["questions"]) == 2 and second[1]["questions"][0]["answers"] == []
    assert first[1]["image_id"] == genome[1]["image_id"] == "vg/2405722" and second[1]["image_id"] == "gqa/n161313"
    assert to_image_id("vg/2405722") != 2405722  # COCO's image of that number


def vqa_files(folder: Path, prefix: str, **more: Any) -> list[Path]:
    """Questions and annotations of three images, as on visualqa.org."""
    questions = [
        {"image_id": image_id, "question": f"Where? {n}", "question_id": image_id * 1000 + n}
        for image_id, n in [(262148, 0), (393225, 0), (262148, 1), (5, 0)]
    ]
    answers = [
        {"answer": "down" if n else "at table", "answer_confidence": "yes", "answer_id": n + 1, **more.get("raw", {})}
        for n in range(10)
    ]
    annotations = [
        {"question_type": more.get("question_type", "what is"), "multiple_choice_answer": "down", "answers": answers,
         "image_id": row["image_id"], "answer_type": "other", "question_id": row["question_id"]}
        for row in questions[:3]
    ]  # fmt: skip
    annotations.append(annotations[0] | {"image_id": 6, "question_id": 6000})
    head = {"info": {"year": 2017}, "license": {"name": "CC BY 4.0"}, "data_type": "mscoco", "data_subtype": "val2014"}
    head |= {"task_type": "Open-Ended"}
    return [
        save(folder / f"{prefix}OpenEnded_mscoco_val2014_questions.json", head | {"questions": questions}),
        save(folder / f"{prefix}mscoco_val2014_annotations.json",
             head | {"annotations": annotations} | more.get("head", {})),
    ]  # fmt: skip


def test_vqav2_questions_are_grouped_by_image_whatever_the_order_of_the_files(tmp_path: Path) -> None:
    images = put(tmp_path, *(f"val2014/COCO_val2014_{number:012d}.jpg" for number in (262148, 393225)))
    files = vqa_files(tmp_path, "v2_")
    source = VqaSource(images, files)
    first, second = read(source)[:2]
    assert first[0] == "COCO_val2014_000000262148" and second[1]["image_id"] == 393225
    assert first[1] == {
        "questions": [
            {"question_id": f"26214800{n}", "question": f"Where? {n}", "answers": ["at table"] + ["down"] * 9,
             "kind": "other", "question_type": "what is"}
            for n in range(2)
        ],
        "image_id": 262148, "split": "val2014",
    }  # fmt: skip
    assert dict(source.skipped.counts) == {"question_without_answers": 1, "answers_without_question": 1}
    assert read(VqaSource(images, files[::-1])) == read(source)


def test_okvqa_scores_the_stems_keeps_the_words_and_names_the_category(tmp_path: Path) -> None:
    images = put(tmp_path, "val2014/COCO_val2014_000000262148.jpg")
    types = {"question_types": {"one": "Vehicles and Transportation"}}
    files = vqa_files(tmp_path, "", raw={"raw_answer": "racing", "answer": "race"}, question_type="one", head=types)
    question = read(VqaSource(images, files, kind="okvqa"))[0][1]["questions"][0]
    assert (question["answers"], question["raw_answers"]) == (["race"] * 10, ["racing"] * 10)
    assert question["kind"] == "Vehicles and Transportation"


def test_the_vqa_test_set_has_no_answers_and_other_splits_need_theirs(tmp_path: Path) -> None:
    images = put(tmp_path, "test2015/COCO_test2015_000000262144.jpg")
    questions, annotations = vqa_files(tmp_path, "v2_")
    with pytest.raises(DataError, match="the questions of val2014 without their answers"):
        VqaSource(images, [questions])
    with pytest.raises(DataError, match="no file of questions"):
        VqaSource(images, [annotations])
    content = json.loads(questions.read_text()) | {"data_subtype": "test-dev2015"}
    content["questions"] = [{"image_id": 262144, "question": "Is it?", "question_id": 262144000}]
    path = save(tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json", content)
    (row,) = read(VqaSource(images, [path]))
    assert row[0] == "COCO_test2015_000000262144" and row[1]["questions"][0]["answers"] == []
    with pytest.raises(DataError, match="questions of test-dev2015 and answers of val2014"):
        VqaSource(images, [path, annotations])


def test_vqa_answers_may_lack_their_numbers_and_a_broken_question_is_named(tmp_path: Path) -> None:
    images = put(tmp_path, "val2014/COCO_val2014_000000262148.jpg")
    questions, annotations = vqa_files(tmp_path, "v2_")
    content = json.loads(annotations.read_text())
    for row in content["annotations"]:
        row["answers"] = [{"answer": "down", "answer_confidence": "yes"}] * 10
        del row["answer_type"], row["question_type"]
    question = read(VqaSource(images, [questions, save(annotations, content)]))[0][1]["questions"][0]
    assert question == {"question_id": "262148000", "question": "Where? 0", "answers": ["down"] * 10}
    content = json.loads(questions.read_text())
    del content["questions"][1]["question"]
    with pytest.raises(DataError, match="a question without 'question'"):
        list(VqaSource(images, [save(questions, content), annotations]).rows())


def test_sbu_joins_its_two_lists_by_line(tmp_path: Path) -> None:
    images = put(tmp_path, "dataset/4385058960_b0f291553e.jpg")
    urls, captions = tmp_path / "SBU_captioned_photo_dataset_urls.txt", tmp_path / "captions.txt"
    url = "http://static.flickr.com/2723/4385058960_b0f291553e.jpg"
    urls.write_text(f"{url}\nhttp://static.flickr.com/1/gone.jpg\nhttp://static.flickr.com/1/c.jpg\n")
    captions.write_bytes(b"A wooden chair in the living room\ngone\ncaf\xe9\n")
    source = SbuSource(images, [captions, urls])
    stem = "4385058960_b0f291553e"
    fields = {"captions": ["A wooden chair in the living room"], "image_id": f"sbu/{stem}", "url": url}
    found = [(row.key, load(row)) for row in source.rows()]
    assert found == [(stem, (fields, f"dataset/{stem}.jpg".encode())), ("gone", "missing_image")]
    assert dict(source.skipped.counts) == {"bad_text": 1}
    captions.write_text("one\n")
    with pytest.raises(DataError, match="3 urls and 1 captions"):
        SbuSource(images, [urls, captions])
    with pytest.raises(DataError, match="0 of 1 files are lists of urls"):
        SbuSource(images, [captions])


def test_a_wrong_file_is_named_with_what_it_holds(tmp_path: Path) -> None:
    coco = save(tmp_path / "coco.json", {"images": [{"id": 1, "file_name": "x"}], "annotations": []})
    karpathy = save(tmp_path / "k.json", {"images": [karpathy_image(0, "test", filename="x")], "dataset": "coco"})
    regions = save(tmp_path / "r.json", [{"id": 1, "regions": []}])
    questions = vqa_files(tmp_path, "v2_")[0]
    words = tmp_path / "words.json"
    words.write_text("<html>")
    makers: list[Any] = [
        lambda path: CocoSource(tmp_path, path),
        lambda path: KarpathySource(tmp_path, path, split="test"),
        lambda path: VisualGenomeSource(tmp_path, path, part="regions"),
        lambda path: VisualGenomeSource(tmp_path, path, part="qas"),
        lambda path: GqaSource(tmp_path, [path]),
        lambda path: VqaSource(tmp_path, [path]),
        lambda path: LavisSource(tmp_path, path, kind="coco"),
    ]
    wrong = [
        (regions, questions, words), (coco, regions, words), (coco, questions, words), (regions, coco),
        (coco, regions, words), (coco, regions, words), (coco, regions, words),
    ]  # fmt: skip
    for make, paths in zip(makers, wrong, strict=True):
        for path in paths:
            with pytest.raises(DataError, match=r"keys (id|images|info)|no JSON") as error:
                make(path)
            assert error.value.fix.startswith("give ") and str(path) in error.value.where
    assert not is_lavis_list(coco) and not is_lavis_list(regions)
    assert KarpathySource(tmp_path, karpathy, split="test").count() == 1
    for images, annotations, found in [
        (tmp_path / "gone", coco, "no folder"), (coco, coco, "a file where a folder"),
        (tmp_path, tmp_path / "gone", "no file"), (tmp_path, tmp_path, "a folder where a file"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=found):
            CocoSource(images, annotations)


def test_a_caption_that_is_no_utf8_costs_its_record(tmp_path: Path) -> None:
    images = put(tmp_path, "val2014/COCO_val2014_000000000001.jpg")
    rows = [{"image": "val2014/COCO_val2014_000000000001.jpg", "caption": "caf\u00e9"}]
    path = save(tmp_path / "list.json", rows)
    path.write_bytes(path.read_bytes().replace(b"\\u00e9", b"\xe9"))
    with pytest.raises(DataError, match="bad_text"):
        pack(LavisSource(images, path, kind="coco", subfolders=COCO_FOLDERS), tmp_path / "out")


def test_rows_can_be_sent_to_another_process(tmp_path: Path) -> None:
    import pickle

    from blip2train.data.source.img2dataset import Img2DatasetSource

    folder = Path(__file__).parents[1] / "data" / "img2dataset" / "webdataset"
    row = next(iter(Img2DatasetSource(folder).rows()))
    again: Row = pickle.loads(pickle.dumps(row))
    assert (again.key, again.image) == (row.key, row.image) and load(again) == load(row)


def test_real_photographs_pass_through_as_coco(shared_data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "photos" / "captions.jsonl").read_text().splitlines()]
    content = {
        "images": [{"id": row["coco_id"], "file_name": Path(row["image"]).name} for row in rows],
        "annotations": [
            {"image_id": row["coco_id"], "id": n * 10 + m, "caption": text}
            for n, row in enumerate(rows)
            for m, text in enumerate(row["captions"])
        ],
    }
    path = save(tmp_path / "c.json", content)
    found = [load(row) for row in CocoSource(shared_data / "photos" / "images", path).rows()]
    assert [fields["captions"] for fields, _ in found] == [row["captions"] for row in rows]
    assert all(image.startswith(b"\xff\xd8\xff") for _, image in found)


def test_packed_questions_are_what_the_vqa_benchmark_reads(shared_data: Path, tmp_path: Path) -> None:
    """The real OK-VQA questions of the photographs, in the official layout and through the shards."""
    rows = [json.loads(line) for line in (shared_data / "photos" / "captions.jsonl").read_text().splitlines()]
    asked = [
        (row["coco_id"], entry | {"answers": list(entry.get("answers") or entry["answer_scores"])})
        for row in rows
        for entry in row["qa"]
    ]
    head = {"data_type": "mscoco", "data_subtype": "val2014"}
    questions = [
        {"image_id": coco_id, "question": entry["question"], "question_id": entry["question_id"]}
        for coco_id, entry in asked
    ]
    annotations = [
        {"image_id": coco_id, "question_id": entry["question_id"], "answer_type": "other", "question_type": "four",
         "answers": [{"answer_id": n, "answer": text, "raw_answer": text, "answer_confidence": "yes"}
                     for n, text in enumerate(entry["answers"])]}
        for coco_id, entry in asked
    ]  # fmt: skip
    files = [
        save(tmp_path / "OpenEnded_mscoco_val2014_questions.json", head | {"questions": questions}),
        save(tmp_path / "mscoco_val2014_annotations.json", head | {"annotations": annotations}),
    ]
    images = tmp_path / "val2017"
    images.symlink_to(shared_data / "photos" / "images")
    manifest = pack(VqaSource(tmp_path, files, kind="okvqa"), tmp_path / "out")
    assert (manifest["num_questions"], manifest["num_skipped"]) == (len(asked), 0)
    items = list(read_eval_items(str(tmp_path / "out"), lambda image, generator: image))
    found = [
        (item.image_id, question.question_id, question.question, question.answers, question.kind)
        for item in items
        for question in item.questions
    ]
    assert sorted(found) == sorted(
        (coco_id, str(entry["question_id"]), entry["question"], tuple(entry["answers"]), "other")
        for coco_id, entry in asked
    )
