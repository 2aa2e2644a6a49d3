"""An index of tars from anywhere: right, resumed without reading again, and honest about what cannot be read."""

import gzip
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from flaky_server import FlakyServer, serve
from shard_factory import write_shards, write_tar

from blip2train.cli import data_index
from blip2train.cli.config import compose
from blip2train.data import index_shards as module
from blip2train.data.index_shards import index_shards, scan_shard
from blip2train.data.shards import ShardCache, ShardReader, expand_urls, open_shards
from blip2train.errors import ConfigError, DataError


def rows(path: Path) -> dict[str, tuple[int, int, str]]:
    loaded = json.loads(path.read_text())
    assert loaded["num_records"] == sum(row["num_records"] for row in loaded["shards"])
    return {row["name"]: (row["num_records"], row["num_bytes"], row["sha256"]) for row in loaded["shards"]}


def expected(paths: list[Path], sizes: list[int]) -> dict[str, tuple[int, int, str]]:
    contents = [path.read_bytes() for path in paths]
    return {
        path.name: (size, len(content), hashlib.sha256(content).hexdigest())
        for path, size, content in zip(paths, sizes, contents, strict=True)
    }


def count_scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    scanned: list[str] = []

    def scan(url: str, **arguments: Any) -> module.ScannedShard:
        scanned.append(Path(url).name)
        return scan_shard(url, **arguments)

    monkeypatch.setattr(module, "scan_shard", scan)
    return scanned


def test_an_index_beside_each_folder_says_what_lies_there(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "a", [3, 1], index=False)
    second = write_shards(tmp_path / "b", [2], index=False)
    scanned = index_shards([str(path) for path in [*first, *second]])
    assert [shard.damage for shard in scanned] == [None] * 3
    assert rows(tmp_path / "a" / "index.json") == expected(first, [3, 1])
    assert rows(tmp_path / "b" / "index.json") == expected(second, [2])


def test_processes_write_the_same_index(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "a", [3, 1, 2, 4, 1], index=False)
    index_shards([str(path) for path in paths], workers=2)
    assert rows(tmp_path / "a" / "index.json") == expected(paths, [3, 1, 2, 4, 1])


def test_what_is_known_and_unchanged_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [str(path) for path in write_shards(tmp_path, [3, 1, 2], index=False)]
    index_shards(urls)
    scanned = count_scans(monkeypatch)
    index_shards(urls)
    assert scanned == []
    write_shards(tmp_path, [4], index=False)
    os.utime(urls[0], (time.time() + 5, time.time() + 5))
    index_shards(urls)
    assert scanned == ["s-000.tar"]
    assert [size for size, _, _ in rows(tmp_path / "index.json").values()] == [4, 1, 2]


def test_an_interrupted_call_keeps_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_shards(tmp_path, [3, 1, 2], index=False)
    urls = [str(path) for path in paths]

    def interrupt(done: int, total: int | None, num_bytes: int | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_shards(urls, progress=interrupt)
    assert list(rows(tmp_path / "index.json")) == ["s-000.tar", "s-001.tar"]
    scanned = count_scans(monkeypatch)
    index_shards(urls)
    assert scanned == ["s-002.tar"]
    assert rows(tmp_path / "index.json") == expected(paths, [3, 1, 2])


def test_headers_alone_are_enough_without_checksums_and_added_later(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [3, 1], index=False)
    urls = [str(path) for path in paths]
    index_shards(urls, checksums=False)
    assert [row[2] for row in rows(tmp_path / "index.json").values()] == ["", ""]
    assert [shard.sha256 for shard in open_shards(urls)] == [None, None]
    index_shards(urls)
    assert rows(tmp_path / "index.json") == expected(paths, [3, 1])


def test_damage_is_said_every_time_and_an_unreadable_shard_is_in_no_index(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, [4, 4, 4], index=False)
    with paths[0].open("r+b") as file:
        file.truncate(5000)
    paths[1].write_bytes(b"no tar" * 1000)
    twice = write_tar(tmp_path / "twice.tar", [("a.jpg", b"1"), ("a.jpg", b"2"), ("b.jpg", b"3")])
    urls = [str(path) for path in [*paths, twice]]
    for _ in range(2):
        cut, garbage, whole, again = index_shards(urls)
        assert cut.entry is not None and cut.entry.num_records < 4
        assert "truncated_shard" in str(cut.damage)
        assert garbage.entry is None and "no tar" in str(garbage.damage)
        assert whole.damage is None
        assert again.damage == "1 records: duplicate_key"
    assert list(rows(tmp_path / "index.json")) == ["s-000.tar", "s-002.tar", "twice.tar"]
    write_shards(tmp_path, [4, 4, 4], index=False)
    assert [shard.damage for shard in index_shards(urls[:3])] == [None] * 3


def test_remote_shards_get_an_index_elsewhere_that_training_finds(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "s", [3, 1], index=False)
    files = {f"/{folder}/{path.name}": path.read_bytes() for folder in "de" for path in paths}
    files["/d/s-000.tar.gz"] = files["/e/z.tgz?signature=x.tar"] = gzip.compress(paths[0].read_bytes())
    cache = ShardCache(tmp_path / "cache", wait_s=0.01)
    with serve(FlakyServer(files=files)) as server:
        urls = [f"{server.url}{path}" for path in files]
        with pytest.raises(ConfigError, match="out=FILE.json"):
            index_shards(urls, cache=cache)
        scanned = index_shards([*urls, f"{server.url}/d/gone.tar"], out=tmp_path / "out.json", cache=cache)
        assert [shard.damage is None for shard in scanned] == [True] * 6 + [False]
        opened = open_shards(urls, cache, str(tmp_path / "out.json"))
        assert [shard.num_records for shard in opened] == [3, 1, 3, 1, 3, 3]
        reader = ShardReader(opened, ShardCache(tmp_path / "other"))
        assert [reader.record(shard, 0)["__key__"] for shard in range(6)] == [f"r{n:06d}" for n in (0, 3, 0, 3, 0, 0)]
        server.faults = [503] * 9
        with pytest.raises(DataError, match="after 1 attempts|status 503|503"):
            index_shards(
                [f"{server.url}/d/new.tar"], out=tmp_path / "o.json", cache=ShardCache(tmp_path / "x", attempts=1)
            )


def test_a_file_that_is_no_index_is_not_overwritten(tmp_path: Path) -> None:
    urls = [str(path) for path in write_shards(tmp_path, [1], index=False)]
    (tmp_path / "mine.json").write_text('{"name": "not an index"}')
    with pytest.raises(DataError, match="not ours"):
        index_shards(urls, out=tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == '{"name": "not an index"}'


def test_img2datasets_output_needs_no_index_and_can_have_one(tmp_path: Path) -> None:
    """Its layout: 00000.tar of jpg, txt and json, beside it 00000_stats.json and 00000.parquet."""
    paths = []
    for shard, size in enumerate([3, 2]):
        files = [
            (f"{shard:05d}{row:04d}.{extension}", f"{extension} {row}".encode())
            for row in range(size)
            for extension in ("jpg", "json", "txt")
        ]
        paths.append(write_tar(tmp_path / f"{shard:05d}.tar", files))
        stats = {"count": 9, "successes": size, "failed_to_download": 9 - size}
        (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    assert [shard.num_records for shard in open_shards(str(tmp_path))] == [3, 2]
    index_shards(expand_urls(str(tmp_path)))
    assert rows(tmp_path / "index.json") == expected(paths, [3, 2])


def run_verb(*overrides: str) -> int:
    try:
        data_index.run(compose("data_index", [*overrides, "workers=1"]))
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def test_the_verb_writes_the_index_and_its_exit_code_tells_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_shards(tmp_path, [3, 1], index=False)
    assert run_verb(f"urls=[{tmp_path}/*.tar]") == 0
    assert rows(tmp_path / "index.json") == expected(paths, [3, 1])
    paths[1].write_bytes(b"")
    assert run_verb(f"urls=[{tmp_path}/*.tar]") == 1
    assert f"{paths[1]}: no tar: empty file" in capsys.readouterr().out
    with pytest.raises(DataError, match="do not exist"):
        run_verb(f"urls=[{tmp_path}/x*.tar]")
