"""A shard is whole under its name, or not there."""

import hashlib
import itertools
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from shard_factory import write_tar

from blip2train.data.shard_index import ShardEntry
from blip2train.data.shard_reader import read_shard
from blip2train.data.shard_table import finds_key
from blip2train.data.source.base import safe_key
from blip2train.data.tar_shard import TarShard
from blip2train.errors import DataError

RECORDS = {"a/1": {"jpg": b"x" * 3000, "json": b"{}"}, "é" * 80: {"json": b'{"n": 2}', "png": b""}}


def write(path: Path) -> ShardEntry:
    with TarShard(path, path.with_suffix(".partial")) as shard:
        for key, files in RECORDS.items():
            shard.write(key, files)
        assert not path.exists()
        return shard.finish()


def test_it_is_a_plain_tar_with_the_checksum_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    entry = write(path)
    data = path.read_bytes()
    assert entry == ShardEntry("s.tar", 2, len(data), hashlib.sha256(data).hexdigest())
    with tarfile.open(path) as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        assert {(member.mtime, member.uid, member.mode) for member in tar} == {(0, 0, 0o444)}
    assert found == {f"{key}.{kind}": data for key, files in RECORDS.items() for kind, data in files.items()}
    assert list(tmp_path.iterdir()) == [path]


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a.tar").sha256 == write(tmp_path / "b.tar").sha256


def test_unfinished_it_leaves_nothing_and_what_was_there_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(b"older")
    with pytest.raises(KeyboardInterrupt), TarShard(path, tmp_path / "s.partial") as shard:
        shard.write("a", {"jpg": b"x" * 100_000})
        raise KeyboardInterrupt
    del shard
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"older"
    assert capsys.readouterr().err == ""


FOUND = ["a", "a/1", "v1.0/img", "x.y/z.w/k", "__a", "__a__", "a/__b", "a__/b", "é/ü"]
LOST = ["", "a.b", ".a", "a/.b", "a/", "v1.0/a.b", "v1.0", "__a__/b", "a/__MACOSX/b"]


def test_a_key_that_is_taken_is_the_one_that_we_and_webdataset_read(tmp_path: Path) -> None:
    with TarShard(tmp_path / "s.tar", tmp_path / "p") as shard:
        for key in FOUND:
            shard.write(key, {"txt": b"text"})
        shard.finish()
    ours = [record["__key__"] for record in read_shard(str(tmp_path / "s.tar"))]
    theirs = [record["__key__"] for record in wds.tariterators.tarfile_samples([{"url": str(tmp_path / "s.tar")}])]
    assert ours == theirs == FOUND


@pytest.mark.parametrize("key", LOST)
def test_a_key_that_is_refused_is_one_that_a_reader_does_not_find(key: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="record key"), TarShard(tmp_path / "s.tar", tmp_path / "p") as shard:
        shard.write(key, {"txt": b"text"})
    foreign = write_tar(tmp_path / "foreign.tar", [(f"{key}.txt", b"text"), ("other.txt", b"")])
    assert key not in [record["__key__"] for record in read_shard(str(foreign))]


def test_the_keys_that_sources_make_are_all_found_again() -> None:
    words = [".", "..", "_", "__", "a", "a.b", "__MACOSX", "__a__", "é", "-", "\udc80", "\ud800"]
    for name in ("/".join(parts) for number in (1, 2, 3) for parts in itertools.product(words, repeat=number)):
        assert finds_key(safe_key(name)), name


def test_an_appended_record_keeps_the_order_of_its_files_and_its_key(tmp_path: Path) -> None:
    with TarShard(tmp_path / "s.tar", tmp_path / "p") as shard:
        shard.append("a.b", {"txt": b"2", "jpg": b"1"})
        assert shard.finish().num_records == 1
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert tar.getnames() == ["a.b.txt", "a.b.jpg"]
