"""A shard is whole under its name, or not there."""

import hashlib
import tarfile
from pathlib import Path

import pytest

from blip2train.data.shard_index import ShardEntry
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


@pytest.mark.parametrize("key", ["", "a.b", "__a"])
def test_a_key_that_no_reader_would_find_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="record key"), TarShard(tmp_path / "s.tar", tmp_path / "p") as shard:
        shard.write(key, {"json": b"{}"})
