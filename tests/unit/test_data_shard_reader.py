"""Records by number against what webdataset and tarfile read; damage against the bytes that were taken away."""

import io
import json
import logging
import os
import pickle
import resource
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from shard_factory import write_shards, write_tar

from blip2train.data.shards import RawRecord, Shard, ShardReader, open_shards, read_shard
from blip2train.errors import DataError

FILES = [("a.jpg", b"1"), ("a.txt", b"one"), ("b.jpg", b"2" * 700), ("b.txt", b"two"), ("c.jpg", b"3"), ("c.txt", b"")]


def oracle(path: Path) -> list[RawRecord]:
    """What webdataset reads, without its own fields."""
    records = wds.tariterators.tarfile_samples([{"url": str(path)}])
    return [{name: value for name, value in record.items() if name != "__local_path__"} for record in records]


def broken(records: Iterator[RawRecord] | list[RawRecord]) -> list[tuple[str, str]]:
    return [(record["__key__"], record["__broken__"][0]) for record in records if "__broken__" in record]


def usable(records: Iterator[RawRecord] | list[RawRecord]) -> list[str]:
    return [record["__key__"] for record in records if "__broken__" not in record]


def members(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for member, data in entries:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_records_equal_webdatasets_in_every_tar_format(tmp_path: Path, format: int) -> None:
    names = ["b.JPG", "b.json", "a/x.png", "a/x.seg.png", "sub.dir/y.jpg", "日本/絵.jpg", "noextension", "v."]
    names += ["./z.jpg", "__meta__", "__own__/a.jpg", ".hidden"]
    if format != tarfile.USTAR_FORMAT:
        names += [f"{'long' * 60}.jpg", f"{'long' * 60}.json", f"{'deep/' * 60}é.txt"]
    path = members(tmp_path / "x.tar", [(tarfile.TarInfo(name), name.encode() * 99) for name in names], format)
    assert list(read_shard(str(path))) == oracle(path)
    assert len(oracle(path)) == (6 if format == tarfile.USTAR_FORMAT else 8)


def test_a_tar_of_webdatasets_own_writer_reads_the_same(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "w.tar")) as writer:
        for number in range(5):
            writer.write({"__key__": f"{number:05d}", "jpg": bytes([number]) * 99, "json": {"n": number}, "cls": 7})
    assert list(read_shard(str(tmp_path / "w.tar"))) == oracle(tmp_path / "w.tar")


def test_any_record_can_be_read_alone_in_any_order(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [7, 3, 12])
    expected = [oracle(path) for path in paths]
    reader = ShardReader(open_shards(str(tmp_path)), max_open=1)
    for place in np.random.default_rng(0).permutation(22):
        shard = int(np.searchsorted([7, 10], place, side="right"))
        index = int(place) - [0, 7, 10][shard]
        assert reader.record(shard, index) == expected[shard][index]


def test_a_reader_that_was_used_can_be_sent_to_another_process(tmp_path: Path) -> None:
    write_shards(tmp_path, [2])
    reader = ShardReader(open_shards(str(tmp_path)))
    first = reader.record(0, 1)
    assert pickle.loads(pickle.dumps(reader)).record(0, 1) == first


def test_no_more_files_stay_open_than_allowed(tmp_path: Path) -> None:
    write_shards(tmp_path, [1] * 9)
    reader = ShardReader(open_shards(str(tmp_path)), max_open=3)
    for shard in range(9):
        reader.record(shard, 0)
    held = [link.resolve() for link in Path("/proc/self/fd").iterdir() if link.resolve().parent == tmp_path]
    assert sorted(path.name for path in held) == ["s-006.tar", "s-007.tar", "s-008.tar"]


def test_records_cut_off_are_named_and_the_others_read(tmp_path: Path) -> None:
    """At every 512-byte cut: what comes whole is byte-equal, what is promised and gone is named, and nothing else."""
    (path,) = write_shards(tmp_path, [6])
    whole, content = oracle(path), path.read_bytes()
    [shard] = open_shards(str(path))
    with tarfile.open(path) as tar:
        ends = [member.offset_data + member.size for member in tar if member.name.endswith("json")]
    for cut in range(0, len(content) + 1, 256):
        path.write_bytes(content[:cut])
        found = list(ShardReader([shard]).records(0))
        assert len(found) == 6
        num_whole = sum(end <= cut for end in ends)
        kept = [record for record in found if "__broken__" not in record]
        assert kept == whole[: len(kept)]
        # the first record has none before it to compare with: with no end mark behind it, it counts as cut off
        assert len(kept) == num_whole or (num_whole == 1 and not kept), cut
        causes = {cause for _, cause in broken(found)}
        assert causes <= ({"truncated_shard"} if cut >= 512 else {"unreadable_shard"})


def test_a_damaged_header_ends_the_shard_there(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, [6])
    [shard] = open_shards(str(path))
    with tarfile.open(path) as tar:
        offset = tar.getmember("r000003.png").offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 512] = b"\xa5" * 512
    path.write_bytes(content)
    found = list(ShardReader([shard]).records(0))
    assert usable(found) == ["r000000", "r000001", "r000002"]
    assert broken(found) == [(f"s-000#{n}", "truncated_shard") for n in (3, 4, 5)]
    assert f"no tar header at byte {offset}" in found[4]["__broken__"][1]


@pytest.mark.parametrize("content", [b"", b"this is no tar " * 100, b"\x1f\x8b" + bytes(range(256)) * 9, b"x" * 300])
def test_a_file_that_is_no_tar_makes_every_record_unreadable(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.tar").write_bytes(content)
    reader = ShardReader([Shard(str(tmp_path / "bad.tar"), 3)])
    expected = {"__key__": "bad#2", "__url__": str(tmp_path / "bad.tar")}
    record = reader.record(0, 2)
    assert record.pop("__broken__")[0] == "unreadable_shard"
    assert record == expected
    assert broken(reader.records(0)) == [(f"bad#{n}", "unreadable_shard") for n in range(3)]


def test_an_unreadable_shard_nobody_counted_is_one_record_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"garbage" * 1000)
    assert [shard.num_records for shard in open_shards(str(tmp_path))] == [1]
    assert broken(read_shard(str(tmp_path / "bad.tar"))) == [("bad#0", "unreadable_shard")]


def test_a_missing_or_unreadable_file_is_no_crash(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.tar"):
        list(read_shard(str(tmp_path / "gone.tar")))
    gone = ShardReader([Shard(str(tmp_path / "gone.tar"), 1), Shard(str(tmp_path), 1)])
    assert "FileNotFoundError" in gone.record(0, 0)["__broken__"][1]
    assert "IsADirectoryError" in gone.record(1, 0)["__broken__"][1]


def test_the_second_of_two_files_of_one_name_is_a_duplicate(tmp_path: Path) -> None:
    again = write_tar(tmp_path / "again.tar", [*FILES[:4], ("a.jpg", b"9"), ("a.txt", b"9"), *FILES[4:]])
    found = list(read_shard(str(again)))
    assert broken(found) == [("a", "duplicate_key")]
    assert [record["__key__"] for record in found] == ["a", "b", "a", "c"]
    assert found[0]["jpg"] == b"1"
    twice = write_tar(tmp_path / "twice.tar", [("a.jpg", b"1"), ("a.JPG", b"2"), ("b.jpg", b"3")])
    assert broken(read_shard(str(twice))) == [("a", "duplicate_key")]
    assert usable(read_shard(str(twice))) == ["a", "b"]


def test_a_shard_with_more_records_than_promised_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = write_shards(tmp_path, [5])
    reader = ShardReader([Shard(str(path), 3)])
    with caplog.at_level(logging.WARNING):
        assert [reader.record(0, index)["__key__"] for index in range(3)] == ["r000000", "r000001", "r000002"]
        reader.close()
        reader.record(0, 0)
    assert [record.message for record in caplog.records] == [
        f"{path} holds 5 records, its index says 3: write it again"
    ]


def test_names_and_links_never_reach_the_file_system(tmp_path: Path) -> None:
    link, hard, device = tarfile.TarInfo("l.jpg"), tarfile.TarInfo("h.jpg"), tarfile.TarInfo("d.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../evil.jpg"
    device.type = tarfile.CHRTYPE
    named = [
        (tarfile.TarInfo(name), b"x") for name in ("../../evil.jpg", "/abs/olute.jpg", "a.__key__", "a.__broken__")
    ]
    inner = tmp_path / "in"
    inner.mkdir()
    path = members(inner / "x.tar", [*named, (link, b""), (hard, b""), (device, b""), (tarfile.TarInfo("z.jpg"), b"z")])
    before = sorted(tmp_path.rglob("*"))
    found = list(read_shard(str(path)))
    assert usable(found) == ["../../evil", "/abs/olute", "z"]
    assert sorted(tmp_path.rglob("*")) == before


def test_hidden_files_of_macos_make_no_records(tmp_path: Path) -> None:
    names = ["a.jpg", "._a.jpg", "__MACOSX/._a.jpg", "x/__MACOSX/a.jpg", "x/.DS_Store", "a.txt"]
    path = write_tar(tmp_path / "x.tar", [(name, b"x") for name in names])
    (record,) = read_shard(str(path))
    assert (record["__key__"], sorted(record)) == ("a", ["__key__", "__url__", "jpg", "txt"])


def test_keys_are_text_that_can_be_written_whatever_the_bytes(tmp_path: Path) -> None:
    member = tarfile.TarInfo("broken\udcff\udc80.jpg")
    path = members(tmp_path / "x.tar", [(member, b"x")], tarfile.GNU_FORMAT)
    (record,) = read_shard(str(path))
    assert record["__key__"] == r"broken\xff\x80"
    json.dumps(record["__key__"]).encode("utf-8")


def test_random_damage_never_crashes_and_never_changes_the_number_of_records(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, [8])
    [shard] = open_shards(str(path))
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 40):
            damaged[place // 512 * 512 + int(rng.integers(0, 160))] = int(rng.integers(0, 256))
        path.write_bytes(damaged)
        reader = ShardReader([shard])
        found: list[dict[str, Any]] = [reader.record(0, index) for index in range(8)]
        assert all(isinstance(record["__key__"], str) and record["__url__"] == str(path) for record in found)
        reader.close()


def test_data_behind_the_end_of_the_archive_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = write_tar(tmp_path / "1.tar", FILES[:4]), write_tar(tmp_path / "2.tar", FILES[4:])
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert usable(read_shard(str(joined))) == ["a", "b"]
    assert "behind the end mark" in caplog.text


def test_good_shards_are_not_dropped_where_few_files_may_be_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [write_tar(tmp_path / f"{number}.tar", FILES) for number in range(30)]
    reader, late = (ShardReader([Shard(str(path), 3) for path in paths]) for _ in range(2))
    in_use = {int(link.name) for link in Path("/proc/self/fd").iterdir()}
    tenth_free = [number for number in range(1000) if number not in in_use][9]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (tenth_free + 1, hard))
    held = []
    try:
        records = [reader.record(shard, 0) for shard in range(30)]
        with suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(DataError, match="Too many open files"):  # it has none to close
            late.record(0, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in held:
            os.close(file)
        reader.close()
    assert usable(records) == ["a"] * 30
    assert "Too many open files" in caplog.text
