"""Shards against tars that the standard library writes and reads."""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
from shard_factory import write_shards

from blip2train.data.shards import ShardWriter, expand_urls, open_shards
from blip2train.errors import ConfigError, DataError


def test_braces_globs_folders_and_lists_name_the_same_shards(tmp_path: Path) -> None:
    expected = [str(path) for path in write_shards(tmp_path, [1, 1, 1])]
    assert expand_urls(str(tmp_path / "s-{000..002}.tar")) == expected
    assert expand_urls(str(tmp_path / "s-*.tar")) == expected
    assert expand_urls(str(tmp_path)) == expected
    assert expand_urls([expected[2], expected[0]]) == [expected[2], expected[0]]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path, [1])
    with pytest.raises(DataError, match=r"2 of the shards do not exist: .*s-001.tar, .*s-002.tar"):
        expand_urls(str(tmp_path / "s-{000..002}.tar"))
    with pytest.raises(DataError, match="working folder"):
        expand_urls(str(tmp_path / "nothing-*.tar"))
    with pytest.raises(ConfigError, match="empty list"):
        expand_urls([])


def test_remote_urls_expand_without_being_opened() -> None:
    assert expand_urls("https://example.org/{00..01}.tar") == [f"https://example.org/0{n}.tar" for n in (0, 1)]
    with pytest.raises(DataError, match=r"data index .*out=index.json"):
        open_shards("pipe:cat {a,b}.tar")


def test_written_shards_are_plain_tars_with_counts_and_sha256(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "p", samples_per_shard=2) as writer:
        for number in range(5):
            writer.write(f"k{number}", bytes([number]) * 3, "jpg", json.dumps({"n": number}).encode())
    index = json.loads((tmp_path / "index.json").read_text())
    assert [row["num_records"] for row in index["shards"]] == [2, 2, 1]
    assert index["num_records"] == 5
    for row in index["shards"]:
        data = (tmp_path / row["name"]).read_bytes()
        assert (row["sha256"], row["num_bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    with tarfile.open(tmp_path / "p-000001.tar") as tar:
        assert tar.getnames() == ["k2.jpg", "k2.json", "k3.jpg", "k3.json"]
        assert not any(member.pax_headers for member in tar)  # extended headers halve the reading speed
        assert tar.extractfile("k3.jpg").read() == b"\x03\x03\x03"
    assert [shard.num_records for shard in open_shards(str(tmp_path))] == [2, 2, 1]


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    digests = []
    for folder in ("a", "b"):
        with ShardWriter(tmp_path / folder) as writer:
            writer.write("k", b"image", "png", b"{}")
        digests.append(writer.entries[0].sha256)
    assert digests[0] == digests[1]


def test_an_error_while_writing_leaves_no_half_shard(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for number in range(3):
            writer.write(f"k{number}", b"x", "jpg", b"{}")
        raise RuntimeError
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["shard-000000.tar"]


def test_two_sets_in_one_folder_share_the_index(tmp_path: Path) -> None:
    for prefix, count in (("train", 3), ("val", 1)):
        with ShardWriter(tmp_path, prefix, samples_per_shard=2) as writer:
            for number in range(count):
                writer.write(f"k{number}", b"x", "jpg", b"{}")
    assert [shard.num_records for shard in open_shards(str(tmp_path / "train-*.tar"))] == [2, 1]
    assert [shard.num_records for shard in open_shards(str(tmp_path / "val-*.tar"))] == [1]


@pytest.mark.parametrize("key", ["", "a.b", "__meta__/a"])
def test_keys_that_a_tar_cannot_carry_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="record key"):
        ShardWriter(tmp_path).write(key, b"x", "jpg", b"{}")


def test_a_foreign_index_is_a_data_error_that_says_what_to_do(tmp_path: Path) -> None:
    write_shards(tmp_path, [1])
    (tmp_path / "index.json").write_text("{]")
    with pytest.raises(DataError, match="delete it, and write another"):
        open_shards(str(tmp_path))
