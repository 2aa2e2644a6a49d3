"""One shard in, one shard out: nothing of a record changes but its captions, and every record is accounted for."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from hostile_world import build_hostile_world
from shard_factory import encode, noise, plain, write_tar
from torch import Tensor
from web_shards import write_web_shards

from blip2train.capfilt.candidate import KeepRule
from blip2train.capfilt.ranker import Ranking
from blip2train.capfilt.shard import ShardResult, ShardSettings, process_shard
from blip2train.data.drop import Drop
from blip2train.data.mixture import Dataset, Mixture
from blip2train.data.sample import to_sample
from blip2train.data.shards import Shard, open_shards, read_shard
from blip2train.data.sharing import Shape
from blip2train.data.stream import PartStream
from blip2train.errors import DataError


class Scripted:
    """Captions an image by its key and scores a text by its length; remembers its batches."""

    def __init__(self, captions: Sequence[str] = ("a {key} dog", "{key}", "a big {key} dog", "a {key} dog.")) -> None:
        self.captions = captions
        self.batches: list[list[str]] = []

    def __call__(self, images: Sequence[Tensor], keys: Sequence[str]) -> list[list[str]]:
        self.batches.append(list(keys))
        return [[text.format(key=key) for text in self.captions] for key in keys]


def by_length(images: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> Ranking:
    return Ranking([[len(text) / 100 for text in row] for row in texts], sum(len(row) > 4 for row in texts))


def files(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def process(
    url: str, out: Path, settings: ShardSettings, count: int = 6, captions: Scripted | None = None
) -> ShardResult:
    return process_shard(Shard(url, count), out, captions or Scripted(), by_length, settings)


def test_keys_images_and_other_files_stay_byte_for_byte_and_captions_are_the_best(tmp_path: Path) -> None:
    (url,) = write_web_shards(tmp_path, [6])
    result = process(url, tmp_path / "out" / "s.tar", ShardSettings(batch_size=4))
    before, after = files(Path(url)), files(tmp_path / "out" / "s.tar")
    assert list(before) == list(after)
    assert all(after[name] == data for name, data in before.items() if not name.endswith("json"))
    fields = json.loads(after["000000003.json"])
    original = json.loads(before["000000003.json"])
    assert {name: fields[name] for name in original} == original
    assert fields["captions"] == ["the green in the on", "a big 000000003 dog"], "of the same length"
    assert fields["caption_origins"] == ["web", "synthetic"]
    assert fields["caption_scores"] == [0.19, 0.19]
    assert result.entry is not None
    assert (result.entry.num_records, result.num_read, result.drops) == (6, 6, [])


def test_batches_follow_the_file_and_hold_usable_records_only(tmp_path: Path) -> None:
    (url,) = write_web_shards(tmp_path, [6], broken=[1])
    captions = Scripted()
    process(url, tmp_path / "o.tar", ShardSettings(batch_size=4), captions=captions)
    assert [[int(key) for key in batch] for batch in captions.batches] == [[0, 2, 3], [4, 5]]


@pytest.mark.parametrize("keep", [False, True])
def test_an_image_that_does_not_decode_is_counted_and_left_out_or_passed_on(tmp_path: Path, keep: bool) -> None:
    (url,) = write_web_shards(tmp_path, [6], broken=[1, 4])
    result = process(url, tmp_path / "o.tar", ShardSettings(batch_size=2, keep_unusable=keep))
    after, before = files(tmp_path / "o.tar"), files(Path(url))
    assert [(drop.cause, drop.key) for drop in result.drops] == [("corrupt_image", f"{n:09d}") for n in (1, 4)]
    assert result.statistics.counts["images"] == 4
    assert result.entry is not None
    assert result.entry.num_records == (6 if keep else 4)
    assert ("000000001.jpg" in after) == keep
    if keep:
        assert after["000000001.json"] == before["000000001.json"]


def test_a_shard_that_was_cut_off_loses_its_last_records_and_says_so(tmp_path: Path) -> None:
    (url,) = write_web_shards(tmp_path, [6])
    data = Path(url).read_bytes()
    Path(url).write_bytes(data[: len(data) // 2])
    result = process(url, tmp_path / "o.tar", ShardSettings())
    assert result.num_read == 6
    assert result.entry is not None
    assert result.entry.num_records + len(result.drops) == 6
    assert {drop.cause for drop in result.drops} == {"truncated_shard"}


def test_images_without_any_web_caption_are_captioned(tmp_path: Path) -> None:
    write_tar(tmp_path / "in.tar", [("k.png", encode(noise(1))), ("m.png", encode(noise(2))), ("m.json", b"{}")])
    result = process(str(tmp_path / "in.tar"), tmp_path / "o.tar", ShardSettings(), count=2)
    assert json.loads(files(tmp_path / "o.tar")["k.json"])["captions"] == ["a big k dog", "a k dog"]
    assert result.statistics.counts["images_with_web_caption"] == 0
    assert result.statistics.counts["captions_kept"] == 4


def test_a_caption_that_says_nothing_costs_no_image(tmp_path: Path) -> None:
    captions = {"a": ["..."], "b": ["a usable one", "half a pair \ud800", 3]}
    write_tar(
        tmp_path / "in.tar",
        [
            file
            for key, texts in captions.items()
            for file in ((f"{key}.png", encode(noise(1))), (f"{key}.json", json.dumps({"captions": texts}).encode()))
        ],
    )
    result = process(str(tmp_path / "in.tar"), tmp_path / "o.tar", ShardSettings(), count=2)
    counts = result.statistics.counts
    assert not result.drops
    assert (counts["images"], counts["images_with_web_caption"], counts["texts_left_out_unusable"]) == (2, 1, 3)
    assert json.loads(files(tmp_path / "o.tar")["a.json"])["caption_origins"] == ["synthetic", "synthetic"]


def test_a_hostile_data_set_is_accounted_for_to_the_last_record(tmp_path: Path) -> None:
    world = build_hostile_world(tmp_path / "in")
    dropped: Counter[str] = Counter()
    written = num_read = 0
    for number, shard in enumerate(open_shards(world.urls)):
        result = process_shard(shard, tmp_path / "out" / f"{number}.tar", Scripted(), by_length, ShardSettings())
        num_read += result.num_read
        written += 0 if result.entry is None else result.entry.num_records
        dropped.update(drop.cause for drop in result.drops)
    mended = {"no_caption", "empty_caption"}
    assert dropped == {cause: count for cause, count in world.planned.items() if cause not in mended}
    assert num_read == world.num_records == written + dropped.total()
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / "in", tmp_path / "out"}


def test_all_candidates_are_stored_where_asked_for(tmp_path: Path) -> None:
    (url,) = write_web_shards(tmp_path, [1])
    process(url, tmp_path / "o.tar", ShardSettings(KeepRule(keep=1), store_all=True), count=1)
    fields = json.loads(files(tmp_path / "o.tar")["000000000.json"])
    found = fields["caption_candidates"]
    assert [row["text"] for row in found if row["kept"]] == fields["captions"]
    assert [row["origin"] for row in found] == ["web", "synthetic", "synthetic", "synthetic"]
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    assert found[-1] == {"text": "000000000", "origin": "synthetic", "score": 0.09, "kept": False}


def test_texts_are_counted_to_the_last(tmp_path: Path) -> None:
    (url,) = write_web_shards(tmp_path, [5])
    counts = process(url, tmp_path / "o.tar", ShardSettings(KeepRule(min_words=2)), count=5).statistics.counts
    assert counts["texts"] == 5 * 5
    left_out = counts["texts_left_out_duplicate"] + counts["texts_left_out_too_short"] + counts["texts_left_out_empty"]
    assert (counts["texts_left_out_duplicate"], counts["texts_left_out_too_short"]) == (5, 5)
    assert counts["candidates"] + left_out == counts["texts"]
    assert counts["web_candidates"] + counts["synthetic_candidates"] == counts["candidates"]
    assert counts["web_kept"] + counts["synthetic_kept"] == counts["captions_kept"] == 10


def test_an_image_that_keeps_no_caption_is_left_out_and_counted(tmp_path: Path) -> None:
    (url,) = write_web_shards(tmp_path, [5])
    strict = KeepRule(min_score=0.9)
    result = process(url, tmp_path / "o.tar", ShardSettings(strict), count=5)
    assert result.entry is None
    assert not (tmp_path / "o.tar").exists()
    assert result.statistics.counts["images_without_caption"] == 5
    passed = process(url, tmp_path / "o.tar", ShardSettings(strict, keep_unusable=True), count=5)
    assert passed.entry is not None
    assert passed.entry.num_records == 5


def test_output_of_an_earlier_call_is_refused(tmp_path: Path) -> None:
    (url,) = write_web_shards(tmp_path, [2])
    process(url, tmp_path / "once.tar", ShardSettings(), count=2)
    with pytest.raises(DataError, match="CapFilt has been over already"):
        process(str(tmp_path / "once.tar"), tmp_path / "twice.tar", ShardSettings(), count=2)
    assert not (tmp_path / "twice.tar").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_training_draws_one_of_the_kept_captions_per_epoch_and_both_over_time(tmp_path: Path) -> None:
    (url,) = write_web_shards(tmp_path / "in", [3])
    out = tmp_path / "out" / "o.tar"
    process(url, out, ShardSettings(), count=3)
    kept = {record["__key__"]: json.loads(record["json"])["captions"] for record in read_shard(str(out))}

    def epochs(seed: int) -> list[tuple[int, str, str]]:
        made = Mixture([Dataset("web", str(out.parent), plain)], seed=seed, num_streams=1)
        parts = islice(PartStream(made, list, Shape(0, 1, 1, 3), 0), 12)
        return [(sample.epoch, sample.key, sample.caption) for part in parts for sample in part.rows]

    drawn = epochs(0)
    assert Counter((epoch, key) for epoch, key, _ in drawn) == {(e, key): 1 for e in range(12) for key in kept}
    for key, captions in kept.items():
        assert {caption for _, found, caption in drawn if found == key} == set(captions), "both over the epochs"
    assert epochs(0) == drawn
    assert sorted(epochs(1)) != sorted(drawn)


def test_a_web_caption_that_was_rejected_does_not_come_back_from_its_txt(tmp_path: Path) -> None:
    text = [("k.png", encode(noise(1))), ("k.txt", b"buy now"), ("k.json", b'{"caption": "buy now"}')]
    write_tar(tmp_path / "in.tar", text)
    strict = ShardSettings(KeepRule(min_score=0.9), keep_unusable=True)
    process(str(tmp_path / "in.tar"), tmp_path / "o.tar", strict, count=1)
    (record,) = read_shard(str(tmp_path / "o.tar"))
    sample = to_sample(record, "web", lambda image, generator: image, torch.Generator())
    assert isinstance(sample, Drop) and sample.cause == "no_caption"
