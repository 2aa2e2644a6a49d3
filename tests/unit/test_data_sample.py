"""Records of every kind that occurs in the wild, used or counted with the right cause."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_factory import encode, noise, plain, write_shards, write_tar

from blip2train.batch import Question, Sample, to_image_id
from blip2train.data.drop import Drop, DropLedger
from blip2train.data.sample import read_eval_items, to_eval_item, to_sample
from blip2train.errors import DataError

IMAGE = encode(noise(0))


def record(fields: Any = None, **files: bytes) -> dict[str, Any]:
    made: dict[str, Any] = {"__key__": "k1", "__url__": "x.tar", **files}
    if fields is not None:
        made["json"] = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return made


def draw(made: dict[str, Any], seed: int = 0) -> Sample | Drop:
    return to_sample(made, "set", lambda image, _: image, torch.Generator().manual_seed(seed))


def test_a_record_becomes_a_sample() -> None:
    sample = draw(record({"captions": ["A dog."], "image_id": 285}, png=IMAGE))
    assert isinstance(sample, Sample)
    assert (sample.key, sample.dataset, sample.caption, sample.image_id) == ("k1", "set", "A dog.", 285)
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), noise(0))


@pytest.mark.parametrize(
    "made", [record({"caption": "a dog"}, jpg=encode(noise(0), "jpg")), record(txt=b"a dog", webp=IMAGE)]
)
def test_a_single_caption_and_a_plain_txt_count_as_captions(made: dict[str, Any]) -> None:
    sample = draw(made)
    assert isinstance(sample, Sample)
    assert sample.caption == "a dog"
    assert sample.image_id == to_image_id("k1")


@pytest.mark.parametrize("image_id", [285, "285", -1, 10**25, "flickr/1.jpg", 1.5, None, "\ud800"])
def test_any_image_id_becomes_a_stable_int64(image_id: object) -> None:
    made = record({"captions": ["a dog"], "image_id": image_id}, png=IMAGE)
    first, second = draw(made), draw(made, 1)
    assert isinstance(first, Sample) and isinstance(second, Sample)
    assert first.image_id == second.image_id
    assert int(torch.tensor([first.image_id])) == (285 if image_id in (285, "285") else first.image_id)


def test_captions_are_drawn_evenly_from_the_non_empty_ones() -> None:
    made = record({"captions": ["one", " ", "two", "...", "three"]}, png=IMAGE)
    drawn = [draw(made, seed) for seed in range(600)]
    counts = {caption: sum(sample.caption == caption for sample in drawn) for caption in ("one", "two", "three")}
    assert sum(counts.values()) == 600
    assert all(150 < count < 250 for count in counts.values())


@pytest.mark.parametrize(
    ("made", "cause"),
    [
        (record({"captions": ["a dog"]}), "no_image"),
        (record({"captions": ["a dog"]}, png=IMAGE[:100]), "corrupt_image"),
        (record({"captions": ["a dog"]}, jpg=b"words, not pixels"), "corrupt_image"),
        (record(b'{"captions": ["a dog"', png=IMAGE), "bad_json"),
        (record(b"\xff\xfe", png=IMAGE), "bad_json"),
        (record(["a dog"], png=IMAGE), "bad_json"),
        (record({"image_id": 1}, png=IMAGE), "no_caption"),
        (record(None, png=IMAGE), "no_caption"),
        (record({"captions": 3}, png=IMAGE), "bad_json"),
        (record({"captions": [3, ["a dog"]]}, png=IMAGE), "bad_json"),
        (record(b'{"captions": ' + b"[" * 100_000 + b"}", png=IMAGE), "bad_json"),
        (record(b'{"captions": ["caf\xe9"]}', png=IMAGE), "bad_text"),
        (record(b'{"captions": ["\\ud800 dog"]}', png=IMAGE), "bad_text"),
        (record({"captions": ["a\0dog"]}, png=IMAGE), "bad_text"),
        (record(txt=b"caf\xe9", png=IMAGE), "bad_text"),
        (record({"captions": None}, png=IMAGE), "no_caption"),
        (record({"captions": []}, png=IMAGE), "no_caption"),
        (record(b'{"caption": NaN}', png=IMAGE), "no_caption"),
        (record({"caption": "\u200b\u00a0"}, png=IMAGE), "empty_caption"),
        (record({"captions": ["a dog"]}, __broken__=("truncated_shard", "cut off")), "truncated_shard"),
        (record({"captions": ["a dog"]}, __broken__=("duplicate_key", "again")), "duplicate_key"),
        (record({"captions": ["a dog"]}, dropped=b'["corrupt_image", "cut off"]'), "corrupt_image"),
        (record({"captions": ["a dog"]}, dropped=b'["no cause of ours", "x"]', png=IMAGE), "bad_json"),
        (record({"captions": ["a dog"]}, dropped=b"{}", png=IMAGE), "bad_json"),
        (record({"captions": ["a dog"]}, dropped=b"\xff", png=IMAGE), "bad_json"),
        (record({"captions": ["", " ... "]}, png=IMAGE), "empty_caption"),
        (record(txt=b"\n", png=IMAGE), "empty_caption"),
    ],
)
def test_what_cannot_be_used_is_dropped_with_its_cause(made: dict[str, Any], cause: str) -> None:
    dropped = draw(made)
    assert isinstance(dropped, Drop)
    assert dropped.cause == cause
    assert dropped.detail
    assert (dropped.dataset, dropped.url, dropped.key) == ("set", "x.tar", "k1")


def test_one_good_caption_is_enough_and_the_bad_ones_are_never_drawn() -> None:
    made = record(b'{"captions": ["", "\\ud800", 7, null, "a dog", "nul\\u0000"]}', png=IMAGE)
    drawn = {sample.caption for sample in (draw(made, seed) for seed in range(50)) if isinstance(sample, Sample)}
    assert drawn == {"a dog"}


def test_pandas_missing_value_beside_a_txt_leaves_the_txt() -> None:
    sample = draw(record(b'{"caption": NaN}', txt=b"\xef\xbb\xbfa dog", png=IMAGE))
    assert isinstance(sample, Sample) and sample.caption == "a dog"


def test_an_endless_caption_is_cut_before_anything_reads_it() -> None:
    sample = draw(record({"captions": ["a dog and " * 100_000]}, png=IMAGE))
    assert isinstance(sample, Sample) and len(sample.caption) == 10_000


def test_an_image_above_the_pixel_limit_has_a_cause_of_its_own() -> None:
    made = record({"captions": ["a dog"]}, png=IMAGE)
    transform, generator = (lambda image, _: image), torch.Generator()
    assert isinstance(to_sample(made, "set", transform, generator, max_pixels=120), Sample)
    dropped = to_sample(made, "set", transform, generator, max_pixels=119)
    assert isinstance(dropped, Drop) and dropped.cause == "image_too_large"


def test_a_sample_knows_its_epoch() -> None:
    made = record({"captions": ["a dog"]}, png=IMAGE)
    sample = to_sample(made, "set", lambda image, _: image, torch.Generator(), epoch=3)
    assert isinstance(sample, Sample) and sample.epoch == 3


def test_null_for_questions_means_none() -> None:
    item = to_eval_item(record({"questions": None}, png=IMAGE), "set", plain)
    assert not isinstance(item, Drop) and item.questions == ()


def test_an_eval_item_keeps_captions_questions_and_the_rest() -> None:
    questions = [
        {"question_id": 7, "question": "What?", "answers": ["dog", 2], "kind": "what"},
        {"question": "Who?", "answers": []},
    ]
    item = to_eval_item(
        record({"captions": ["A dog!", ""], "questions": questions, "scene": {"n": 1}}, png=IMAGE), "set", plain
    )
    assert not isinstance(item, Drop)
    assert item.captions == ("A dog!",)
    assert item.questions == (Question("7", "What?", ("dog", "2"), "what"), Question("k1/1", "Who?", ()))
    assert item.extra == {"scene": {"n": 1}}


def test_a_question_without_answers_is_bad_json() -> None:
    item = to_eval_item(record({"questions": [{"question": "Who?"}]}, png=IMAGE), "set", plain)
    assert isinstance(item, Drop) and item.cause == "bad_json"


def test_eval_reads_every_record_once_in_order(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 1, 4])
    items = list(read_eval_items(str(tmp_path), plain))
    assert [item.image_id for item in items] == list(range(8))
    np.testing.assert_array_equal(items[5].image.permute(1, 2, 0).numpy(), noise(5))
    assert items[5].captions == ("picture number 5", "image 5 again")


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_ranks_share_the_items_without_overlap(tmp_path: Path, world_size: int) -> None:
    write_shards(tmp_path, [3, 1, 4])
    for limit, expected in ((None, 8), (5, 5), (0, 0), (100, 8)):
        if limit == 0:
            continue
        parts = [
            [item.image_id for item in read_eval_items(str(tmp_path), plain, limit, rank, world_size)]
            for rank in range(world_size)
        ]
        assert sorted(number for part in parts for number in part) == list(range(expected))
        assert all(number % world_size == rank for rank, part in enumerate(parts) for number in part)


def test_eval_refuses_a_corrupt_image_unless_told_otherwise(tmp_path: Path) -> None:
    write_shards(tmp_path, [4], broken={2: b"broken"})
    with pytest.raises(DataError, match="r000002") as caught:
        list(read_eval_items(str(tmp_path), plain))
    assert "max_dropped_share" not in caught.value.fix
    ledger = DropLedger(["check"], max_dropped_share=1.0)
    kept = list(read_eval_items(str(tmp_path), plain, ledger=ledger, dataset="check"))
    assert [item.image_id for item in kept] == [0, 1, 3]
    assert {cause: count for cause, count in ledger.counts()["check"].items() if count} == {
        "used": 3,
        "corrupt_image": 1,
    }


def test_eval_data_without_records_is_a_data_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [])
    with pytest.raises(DataError, match="no records"):
        list(read_eval_items(str(tmp_path), plain))
