"""The folder of a feature cache: one shard per source shard, whatever is broken, interrupted or shared by processes."""

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shard_factory import encode, noise, write_shards, write_tar
from torch import Tensor

from blip2train.batch import ImageSpec, Sample
from blip2train.data.drop import Drop, DropLedger
from blip2train.data.feature_cache import (
    FeatureFacts,
    FinishedShard,
    claim_folder,
    describe_source,
    find_dataset,
    note_finished,
    read_facts,
    read_finished,
)
from blip2train.data.feature_writer import FeatureWriter
from blip2train.data.image_transform import EvalTransform
from blip2train.data.sample import to_sample
from blip2train.data.shards import Shard, ShardEntry, ShardReader, open_shards
from blip2train.data.stored_tokens import StoredTokens
from blip2train.errors import ConfigError, DataError

SPEC = ImageSpec(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
FACTS = FeatureFacts({"name": "vit", "layer": -2, "image": {"size": 8}}, "int8", 4, 44, 48, {"autocast": None}, 100)
STORED = StoredTokens(num_tokens=4, token_bytes=48)


def as_tokens(images: Tensor) -> Tensor:
    """Stands for encoder and codec: the pixels themselves as 4 tokens of 48 bytes."""
    return images.reshape(len(images), 4, 48)


def writer(ledger: DropLedger | None = None, encoder: Callable[[Tensor], Tensor] = as_tokens) -> FeatureWriter:
    ledger = ledger or DropLedger(["pets"], max_dropped_share=1.0)
    return FeatureWriter(EvalTransform(SPEC), encoder, batch_size=4, num_threads=2, ledger=ledger)


def read(shards: list[Shard], transform: object) -> list[list[Sample | Drop]]:
    """Every record as training reads it, shard by shard."""
    reader = ShardReader(shards)
    return [
        [
            to_sample(reader.record(number, index), "pets", transform, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
            for index in range(shard.num_records)
        ]
        for number, shard in enumerate(shards)
    ]


def hostile_shards(folder: Path) -> list[Shard]:
    """Two whole shards; one with a broken image, no caption and a doubled key; one cut off; one that is no tar."""
    whole = write_shards(folder, [6, 5])
    good = encode(noise(3))
    mixed = [("a.png", good), ("a.json", b'{"captions": ["one"]}')]
    mixed += [("b.png", good[:40]), ("b.json", b'{"captions": ["x"]}')]
    mixed += [("c.png", good), ("c.json", b'{"captions": []}'), ("a.png", good), ("a.json", b'{"captions": ["again"]}')]
    mixed += [("d.txt", b"plain"), ("d.png", good)]
    cut, no_tar = folder / "t.tar", folder / "u.tar"
    cut.write_bytes(whole[1].read_bytes()[:5000])
    no_tar.write_bytes(b"no tar at all" * 100)
    paths = [*whole, write_tar(folder / "s-2.tar", mixed), cut, no_tar]
    return [Shard(str(path), count) for path, count in zip(paths, [6, 5, 5, 5, 3], strict=True)]


def test_the_cache_gives_the_samples_and_the_drops_of_its_source_in_their_places(tmp_path: Path) -> None:
    sources = hostile_shards(tmp_path / "source")
    assert writer().write("pets", ShardReader(sources), tmp_path / "cache" / "pets")
    cached = open_shards(find_dataset(tmp_path / "cache", "pets"))
    assert [shard.num_records for shard in cached] == [6, 5, 5, 5, 3]
    num_drops = 0
    for before, after in zip(read(sources, EvalTransform(SPEC)), read(cached, STORED), strict=True):
        assert len(before) == len(after)
        for source, stored in zip(before, after, strict=True):
            if isinstance(source, Drop):
                num_drops += 1
                assert isinstance(stored, Drop) and stored.cause == source.cause
                assert stored.detail.split(" at 0x")[0] == source.detail.split(" at 0x")[0]  # PIL names an address
            else:
                assert isinstance(stored, Sample)
                assert torch.equal(stored.image, as_tokens(source.image[None])[0])
                assert dataclasses.replace(stored, image=source.image) == dataclasses.replace(
                    source, image=source.image
                )
    assert num_drops >= 3 + 3 + 3


def test_keys_with_dots_in_a_folder_or_underscores_in_front_are_kept(tmp_path: Path) -> None:
    keys = ["v1.0/img", "__b/c.d/e", "__f"]
    files = [(f"{key}.{kind}", data) for key in keys for kind, data in (("png", encode(noise(1))), ("txt", b"a cat"))]
    source = Shard(str(write_tar(tmp_path / "source.tar", files)), 3)
    assert writer().write("pets", ShardReader([source]), tmp_path / "cache")
    [cached] = read(open_shards(find_dataset(tmp_path, "cache")), STORED)
    assert [sample.key for sample in cached if isinstance(sample, Sample)] == keys


def test_drops_are_counted_by_cause_and_past_their_budget_the_work_stops(tmp_path: Path) -> None:
    sources = hostile_shards(tmp_path / "source")
    ledger = DropLedger(["pets"], max_dropped_share=1.0)
    writer(ledger).write("pets", ShardReader(sources), tmp_path / "cache")
    notes = [json.loads(path.read_text())["dropped"] for path in sorted((tmp_path / "cache").glob("shard-*.json"))]
    assert notes[0] == notes[1] == {} and notes[4] == {"unreadable_shard": 3}
    causes = {cause for note in notes for cause in note}
    counts = ledger.counts()["pets"]
    assert {cause: counts[cause] for cause in causes} == {c: sum(n.get(c, 0) for n in notes) for c in causes}
    with pytest.raises(DataError, match=r"cannot be used; allowed share"):
        writer(DropLedger(["pets"], max_dropped_share=0.1, minimum_records=5)).write(
            "pets", ShardReader(sources), tmp_path / "b"
        )


def test_an_interrupted_call_continues_after_its_last_whole_shard(tmp_path: Path) -> None:
    write_shards(tmp_path / "source", [9, 9, 9])
    sources, folder = open_shards(str(tmp_path / "source")), tmp_path / "cache" / "pets"
    encoded: list[int] = []

    def fails_in_the_second_shard(images: Tensor) -> Tensor:
        if sum(encoded) >= 13:
            raise KeyboardInterrupt
        encoded.append(len(images))
        return as_tokens(images)

    with pytest.raises(KeyboardInterrupt):
        writer(encoder=fails_in_the_second_shard).write("pets", ShardReader(sources), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["shard-000000.json", "shard-000000.tar"]
    with pytest.raises(ConfigError, match=r"holds only a part of dataset pets"):
        find_dataset(tmp_path / "cache", "pets")
    first = (folder / "shard-000000.tar").stat().st_mtime_ns
    rest: list[int] = []
    assert writer(encoder=lambda images: rest.append(len(images)) or as_tokens(images)).write(
        "pets", ShardReader(sources), folder
    )
    assert sum(rest) == 18 and (folder / "shard-000000.tar").stat().st_mtime_ns == first


def test_processes_share_the_shards_and_the_last_one_completes_the_dataset(tmp_path: Path) -> None:
    write_shards(tmp_path / "source", [3, 4, 5])
    sources = open_shards(str(tmp_path / "source"))
    shared, alone = tmp_path / "shared" / "pets", tmp_path / "alone" / "pets"
    assert not writer().write("pets", ShardReader(sources), shared, rank=1, world_size=2)
    assert [path.name for path in shared.glob("*.tar")] == ["shard-000001.tar"]
    assert writer().write("pets", ShardReader(sources), shared, rank=0, world_size=2)
    assert writer().write("pets", ShardReader(sources), alone)
    for name in ("index.json", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"):
        assert (shared / name).read_bytes() == (alone / name).read_bytes()


def test_a_dataset_whose_shards_have_changed_is_not_continued(tmp_path: Path) -> None:
    write_shards(tmp_path / "source", [3, 4])
    sources = open_shards(str(tmp_path / "source"))
    assert writer().write("pets", ShardReader(sources), tmp_path / "cache")
    with pytest.raises(DataError, match=r"the dataset's shards have changed"):
        writer().write("pets", ShardReader([sources[1], sources[0]]), tmp_path / "cache")
    with pytest.raises(DataError, match=r"1 shards more than the dataset has"):
        writer().write("pets", ShardReader(sources[:1]), tmp_path / "cache")


@pytest.mark.parametrize("indexed", [False, True])
def test_a_shard_that_was_packed_anew_under_its_name_is_not_taken_for_the_old_one(
    tmp_path: Path, indexed: bool
) -> None:
    """By its size; with an index also by its checksum, at the same size."""
    path = write_shards(tmp_path / "source", [3])[0]
    before = path.read_bytes()

    def opened() -> list[Shard]:
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if indexed else None
        return [Shard(str(path), 3, path.stat().st_size if indexed else None, digest)]

    assert writer().write("pets", ShardReader(opened()), tmp_path / "cache")
    path.write_bytes(before[:-1] + b"1" if indexed else before + bytes(512))
    named = "source_sha256" if indexed else f"source_bytes {len(before)} there, {len(before) + 512} here"
    with pytest.raises(DataError, match=rf"{named}[\s\S]*the dataset's shards have changed"):
        writer().write("pets", ShardReader(opened()), tmp_path / "cache")
    path.write_bytes(before)
    assert writer().write("pets", ShardReader(opened()), tmp_path / "cache")


def test_a_remote_shard_is_told_by_what_its_index_says_and_an_unknown_size_says_nothing(tmp_path: Path) -> None:
    entry = ShardEntry("shard-000000.tar", 3, 4, "")
    url = "https://example.org/a.tar"
    (tmp_path / "shard-000000.tar").write_bytes(b"....")
    note_finished(tmp_path, 0, FinishedShard(entry, dropped={}, **describe_source(Shard(url, 3, 700))))
    assert read_finished(tmp_path, 0, Shard(url, 3)) == read_finished(tmp_path, 0, Shard(url, 3, 700, "ab"))
    with pytest.raises(DataError, match=r"source_bytes 700 there, 800 here"):
        read_finished(tmp_path, 0, Shard(url, 3, 800))


def test_a_folder_is_one_cache_and_says_what_another_differs_in(tmp_path: Path) -> None:
    claim_folder(tmp_path / "cache", FACTS)
    claim_folder(tmp_path / "cache", FACTS)
    assert read_facts(tmp_path / "cache") == FACTS and FACTS.bytes_per_image == 192
    other = dataclasses.replace(FACTS, codec="float8", encoder=FACTS.encoder | {"layer": -1})
    with pytest.raises(DataError, match=r"codec 'int8' there, 'float8' here; encoder.layer -2 there, -1 here"):
        claim_folder(tmp_path / "cache", other)
    with pytest.raises(DataError, match=r"max_pixels 100 there, 200 here"):
        claim_folder(tmp_path / "cache", dataclasses.replace(FACTS, max_pixels=200))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"a folder with other files in it"):
        claim_folder(tmp_path / "photos", FACTS)
    with pytest.raises(ConfigError, match=r"no feature cache in"):
        read_facts(tmp_path / "photos")


def test_a_record_of_tokens_that_are_cut_off_or_missing_is_a_counted_drop(tmp_path: Path) -> None:
    text = b'{"captions": ["a cat"]}'
    files = [("a.tokens", bytes(192)), ("a.json", text), ("b.tokens", bytes(191)), ("b.json", text), ("c.json", text)]
    shard = Shard(str(write_tar(tmp_path / "x.tar", files)), 3)
    whole, cut, missing = read([shard], STORED)[0]
    assert isinstance(whole, Sample) and whole.image.shape == (4, 48)
    assert isinstance(cut, Drop) and (cut.cause, cut.detail) == (
        "corrupt_image",
        "191 bytes of image tokens, 192 expected",
    )
    assert isinstance(missing, Drop) and missing.cause == "no_image"


def test_members_of_a_shard_are_what_the_docs_say(tmp_path: Path) -> None:
    write_shards(tmp_path / "source", [2])
    writer().write("pets", ShardReader(open_shards(str(tmp_path / "source"))), tmp_path / "cache")
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "cache" / "shard-000000.tar").read_bytes())) as tar:
        assert sorted(tar.getnames()) == ["r000000.json", "r000000.tokens", "r000001.json", "r000001.tokens"]


def test_two_calls_in_one_folder_never_write_one_shard_together(tmp_path: Path) -> None:
    write_shards(tmp_path / "source", [6, 5])
    sources, folder = open_shards(str(tmp_path / "source")), tmp_path / "cache" / "pets"
    inside: list[bool] = []

    def and_another_call(images: Tensor) -> Tensor:
        if not inside:
            inside.append(writer().write("pets", ShardReader(sources), folder))
        return as_tokens(images)

    assert writer(encoder=and_another_call).write("pets", ShardReader(sources), folder)
    assert inside == [False], "the other call leaves the shard that is being written alone"
    assert writer().write("pets", ShardReader(sources), tmp_path / "alone")
    content = [{path.name: path.read_bytes() for path in where.iterdir()} for where in (folder, tmp_path / "alone")]
    assert content[0] == content[1]


def test_a_dataset_that_has_grown_is_not_whole_before_its_new_shards_are(tmp_path: Path) -> None:
    write_shards(tmp_path / "source", [6, 5, 4])
    sources, folder = open_shards(str(tmp_path / "source")), tmp_path / "cache" / "pets"
    assert writer().write("pets", ShardReader(sources[:2]), folder)

    def fails(images: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer(encoder=fails).write("pets", ShardReader(sources), folder)
    with pytest.raises(ConfigError, match=r"holds only a part of dataset pets"):
        find_dataset(tmp_path / "cache", "pets")
    assert writer().write("pets", ShardReader(sources), folder)
    assert len(open_shards(find_dataset(tmp_path / "cache", "pets"))) == 3


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match=r"a file where a folder is meant"):
        claim_folder(tmp_path / "out", FACTS)
