"""The cache under faults and crowds: right bytes, one download, a bounded folder, no reader left without its file."""

import gzip
import hashlib
import json
import multiprocessing
import os
import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from flaky_server import FlakyServer, serve
from shard_factory import write_shards

from blip2train.data import shard_cache
from blip2train.data.shards import Shard, ShardCache, ShardReader, expand_urls, open_shards, read_shard
from blip2train.errors import ConfigError, DataError


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_shards(tmp_path / "shards", [3, 4, 5, 2], index=False)


@pytest.fixture
def server(shards: list[Path]) -> Iterator[FlakyServer]:
    with serve(FlakyServer(files={f"/d/{path.name}": path.read_bytes() for path in shards})) as running:
        yield running


def index_of(shards: list[Path], **changes: Any) -> bytes:
    rows = [
        {
            "name": path.name,
            "num_records": sum(1 for _ in read_shard(str(path))),
            "num_bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        | changes
        for path in shards
    ]
    return json.dumps({"shards": rows}).encode()


def make(tmp_path: Path, **changes: Any) -> ShardCache:
    return ShardCache(tmp_path / "cache", **({"wait_s": 0.01, "timeout_s": 5.0} | changes))


def copies(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").iterdir() if path.is_file())


def test_remote_records_equal_local_ones_through_every_fault(
    shards: list[Path], server: FlakyServer, tmp_path: Path
) -> None:
    server.files["/d/index.json"] = index_of(shards)
    server.faults = [503]
    cache = make(tmp_path)
    opened = open_shards(f"{server.url}/d/s-{{000..003}}.tar", cache)
    assert [shard.num_records for shard in opened] == [3, 4, 5, 2]
    server.faults = [("cut", 900), 500, ("cut", 20), ("cut", 0)]
    reader = ShardReader(opened, cache)
    for place, path in enumerate(shards):
        expected = [record | {"__url__": opened[place].url} for record in read_shard(str(path))]
        assert list(reader.records(place)) == expected
    assert len(copies(tmp_path)) == 4


def test_a_shard_is_downloaded_once(server: FlakyServer, tmp_path: Path) -> None:
    shard = Shard(f"{server.url}/d/s-000.tar", 3)
    for _ in range(3):
        assert ShardReader([shard], make(tmp_path)).record(0, 1)["__key__"] == "r000001"
    assert len(server.requests) == 1


def test_counts_come_from_what_lies_beside_remote_shards(
    shards: list[Path], server: FlakyServer, tmp_path: Path
) -> None:
    urls, cache = f"{server.url}/d/s-{{000..003}}.tar", make(tmp_path)
    with pytest.raises(DataError, match=r"4 of 4 remote shards without a record count[\s\S]*data index"):
        open_shards(urls, cache)
    for place, size in enumerate([3, 4, 5, 2]):
        server.files[f"/d/s-{place:03d}_stats.json"] = json.dumps({"count": 9, "successes": size}).encode()
    assert [shard.num_records for shard in open_shards(urls, cache)] == [3, 4, 5, 2]
    server.files["/d/sizes.json"] = json.dumps({path.name: 7 for path in shards}).encode()
    assert [shard.num_records for shard in open_shards(urls, cache)] == [7] * 4
    server.files["/d/index.json"] = index_of(shards)
    assert [shard.num_records for shard in open_shards(urls, cache)] == [3, 4, 5, 2]


def test_an_index_elsewhere_names_whole_urls_or_file_names(
    shards: list[Path], server: FlakyServer, tmp_path: Path
) -> None:
    cache, index = make(tmp_path), tmp_path / "elsewhere.json"
    urls = [f"{server.url}/d/{path.name}" for path in shards]
    index.write_bytes(index_of(shards))
    assert [shard.num_records for shard in open_shards(urls, cache, str(index))] == [3, 4, 5, 2]
    rows = json.loads(index_of(shards))["shards"]
    index.write_text(json.dumps({"shards": [row | {"name": url} for row, url in zip(rows, urls, strict=True)]}))
    opened = open_shards([f"pipe:cat {shards[0]}", *urls][1:], cache, str(index))
    assert [(shard.url, shard.num_records) for shard in opened] == list(zip(urls, [3, 4, 5, 2], strict=True))
    index.write_bytes(index_of(shards[:1]))
    with pytest.raises(DataError, match="2 shards have the file name s-000.tar"):
        open_shards([urls[0], urls[0].replace("/d/", "/e/")], cache, str(index))
    with pytest.raises(DataError, match="does not exist"):
        open_shards(urls, cache, str(tmp_path / "gone.json"))


def test_a_command_is_a_shard_too(shards: list[Path], tmp_path: Path) -> None:
    index = tmp_path / "i.json"
    index.write_text(json.dumps({"shards": [{"name": f"pipe:cat {shards[1]}", "num_records": 4}]}))
    cache = make(tmp_path)
    opened = open_shards(f"pipe:cat {shards[1]}", cache, str(index))
    found = [record["__key__"] for record in ShardReader(opened, cache).records(0)]
    assert found == [record["__key__"] for record in read_shard(str(shards[1]))]


def test_stores_are_listed(shards: list[Path], tmp_path: Path) -> None:
    for path in [*shards, shards[0].with_name("other.txt")]:
        with fsspec.open(f"memory://listed/{path.name}", "wb") as file:
            file.write(path.read_bytes() if path.is_file() else b"")
    expected = [f"memory:///listed/{path.name}" for path in shards]
    assert expand_urls("memory://listed/*.tar") == expected
    assert expand_urls("memory://listed/") == expected
    with pytest.raises(DataError, match=r"listed/x\*\.tar"):
        expand_urls("memory://listed/x*.tar")


def test_a_wrong_checksum_is_downloaded_again_once(shards: list[Path], server: FlakyServer, tmp_path: Path) -> None:
    good, bad = shards[0].read_bytes(), shards[0].read_bytes()[:-1] + b"x"
    server.files["/d/s-000.tar"] = bad
    shard = Shard(f"{server.url}/d/s-000.tar", 3, len(good), hashlib.sha256(good).hexdigest())
    with pytest.raises(DataError, match=r"sha256 is .* where its index says"):
        make(tmp_path).open(shard)
    assert len(server.requests) == 2
    assert copies(tmp_path) == []
    server.files["/d/s-000.tar"] = good
    with make(tmp_path).open(shard) as file:
        assert file.read() == good


def test_a_size_that_differs_from_the_index_is_an_error(
    shards: list[Path], server: FlakyServer, tmp_path: Path
) -> None:
    shard = Shard(f"{server.url}/d/s-000.tar", 3, 7)
    with pytest.raises(DataError, match="where 7 are expected"):
        make(tmp_path, attempts=2).open(shard)
    assert copies(tmp_path) == []


def test_the_network_being_down_is_no_dirty_data(server: FlakyServer, tmp_path: Path) -> None:
    server.faults = [503] * 9
    with pytest.raises(DataError, match=r"after 2 attempts[\s\S]*s-000\.tar"):
        ShardReader([Shard(f"{server.url}/d/s-000.tar", 3)], make(tmp_path, attempts=2)).record(0, 0)


def test_a_download_that_is_damaged_in_its_store_is_dirty_data(server: FlakyServer, tmp_path: Path) -> None:
    server.files["/d/bad.tar"] = b"garbage" * 1000
    server.files["/d/cut.tar"] = server.files["/d/s-001.tar"][:3000]
    reader = ShardReader([Shard(f"{server.url}/d/{name}.tar", 4) for name in ("bad", "cut")], make(tmp_path))
    causes = [[record.get("__broken__", ("",))[0] for record in reader.records(shard)] for shard in (0, 1)]
    assert causes[0] == ["unreadable_shard"] * 4
    assert Counter(causes[1]) == {"": 1, "truncated_shard": 3}


def test_the_copies_used_longest_ago_make_room(server: FlakyServer, tmp_path: Path) -> None:
    size = len(server.files["/d/s-000.tar"])
    server.files = {f"/d/{name}.tar": server.files["/d/s-000.tar"] for name in "abcd"}
    cache = make(tmp_path, max_gb=3 * size / 1e9)
    paths = {}
    for name in "abc":
        paths[name] = cache.local_path(f"{server.url}/d/{name}.tar")
        time.sleep(0.01)
    cache.open(f"{server.url}/d/a.tar").close()
    paths["d"] = cache.local_path(f"{server.url}/d/d.tar")
    assert copies(tmp_path) == sorted(paths[name] for name in "acd")


def test_an_open_shard_stays_readable_when_its_copy_has_to_go(server: FlakyServer, tmp_path: Path) -> None:
    size = len(server.files["/d/s-002.tar"])
    cache = make(tmp_path, max_gb=1.2 * size / 1e9)
    reader = ShardReader([Shard(f"{server.url}/d/s-{place:03d}.tar", 2) for place in (2, 1)], cache)
    first = reader.record(0, 0)
    reader.record(1, 0)
    assert len(copies(tmp_path)) == 1
    assert reader.record(0, 0) == first
    assert len(server.requests) == 2


def test_a_shard_larger_than_the_cache_and_a_full_disk_are_errors(
    server: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="max_gb"):
        make(tmp_path, max_gb=1e-6).open(f"{server.url}/d/s-000.tar")
    monkeypatch.setattr(shard_cache, "free_bytes", lambda folder: 1000)
    with pytest.raises(DataError, match="not enough disk space"):
        make(tmp_path).open(f"{server.url}/d/s-000.tar")
    assert copies(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(server: FlakyServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache.folder"):
        ShardCache(tmp_path / "file").open(f"{server.url}/d/s-000.tar")
    with pytest.raises(ConfigError, match="max_gb=0"):
        ShardCache(tmp_path, max_gb=0)


def test_a_download_that_fails_leaves_nothing(server: FlakyServer, tmp_path: Path) -> None:
    server.faults = [("cut", 700)] * 9
    with pytest.raises(DataError):
        make(tmp_path, attempts=3).open(f"{server.url}/d/s-000.tar")
    assert copies(tmp_path) == []


def test_what_a_killed_download_left_does_not_count_and_can_be_removed(server: FlakyServer, tmp_path: Path) -> None:
    cache = make(tmp_path)
    path = cache.local_path(f"{server.url}/d/s-000.tar")
    path.rename(path.with_suffix(".partial"))
    path.with_suffix(".partial").write_bytes(b"half")
    assert cache.open(f"{server.url}/d/s-000.tar").read() == server.files["/d/s-000.tar"]
    stale = path.with_name("f" * 32 + ".partial")
    stale.write_bytes(b"x" * 9999)
    os.utime(stale, (0, 0))
    make(tmp_path, max_gb=2e-5).open(f"{server.url}/d/s-003.tar").close()
    assert not stale.exists()


@pytest.mark.parametrize("kept", [1.0, 0.6])
def test_compressed_tars_are_uncompressed_into_the_cache(shards: list[Path], tmp_path: Path, kept: float) -> None:
    packed = tmp_path / "z" / "s.tar.gz"
    packed.parent.mkdir()
    content = gzip.compress(shards[2].read_bytes())
    packed.write_bytes(content[: int(len(content) * kept)])
    (tmp_path / "z" / "index.json").write_text('{"shards": [{"name": "s.tar.gz", "num_records": 5}]}')
    cache = make(tmp_path)
    found = list(ShardReader(open_shards(str(tmp_path / "z"), cache), cache).records(0))
    expected = [record | {"__url__": str(packed)} for record in read_shard(str(shards[2]))]
    whole = [record for record in found if "__broken__" not in record]
    assert whole == expected[: len(whole)]
    assert len(found) == 5 and (kept < 1 or len(whole) == 5) and (kept == 1 or 0 < len(whole) < 5)
    packed.write_bytes(b"no gzip at all")
    assert ShardReader([Shard(str(packed), 1)], cache).record(0, 0)["__broken__"][0] == "unreadable_shard"


def test_local_tars_are_opened_where_they_lie(shards: list[Path], tmp_path: Path) -> None:
    cache = make(tmp_path)
    assert cache.local_path(str(shards[0])) == shards[0]
    assert cache.open(str(shards[0])).name == str(shards[0])
    cache.prefetch([str(path) for path in shards])
    assert not (tmp_path / "cache").exists()


def test_prefetched_shards_are_there(server: FlakyServer, tmp_path: Path) -> None:
    cache = make(tmp_path)
    reader = ShardReader([Shard(f"{server.url}/d/s-{place:03d}.tar", 2) for place in range(4)], cache)
    server.faults = [404]
    reader.prefetch([3, 1, 1])
    end = time.monotonic() + 10
    while len(server.requests) < 2 or not copies(tmp_path) or copies(tmp_path)[0].suffix != ".tar":
        assert time.monotonic() < end
        time.sleep(0.01)
    assert sorted(path for path, _ in server.requests) == ["/d/s-001.tar", "/d/s-003.tar"]
    assert [reader.record(shard, 0)["__key__"] for shard in (1, 3)] == ["r000003", "r000012"]
    assert len(server.requests) == 3  # the one that failed was asked for again
    pickle.dumps(reader)


def test_options_of_one_dataset_stay_with_it(server: FlakyServer, tmp_path: Path) -> None:
    cache = make(tmp_path)
    cache.with_options({"headers": {"X-Key": "1"}}).open(f"{server.url}/d/s-000.tar").close()
    cache.open(f"{server.url}/d/s-001.tar").close()
    assert [headers.get("X-Key") for headers in server.headers] == ["1", None]


def _read_all(folder: Path, url: str, seed: int, results: Any) -> None:
    cache = ShardCache(folder, wait_s=0.01, max_gb=1.0)
    names = [f"{url}/d/s-{place:03d}.tar" for place in range(4)]
    keys = []
    for turn in range(12):
        with cache.open(names[(seed + turn) % 4]) as file:
            keys.append(hashlib.sha256(file.read()).hexdigest())
    results.put((seed, keys))


def test_processes_and_threads_share_one_download_of_each_shard(server: FlakyServer, tmp_path: Path) -> None:
    threading.Thread(target=make(tmp_path).prefetch, args=([f"{server.url}/d/s-003.tar"],)).start()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=_read_all, args=(tmp_path / "cache", server.url, seed, results)) for seed in range(4)
    ]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    digests = [hashlib.sha256(server.files[f"/d/s-{place:03d}.tar"]).hexdigest() for place in range(4)]
    assert found == {seed: [digests[(seed + turn) % 4] for turn in range(12)] for seed in range(4)}
    assert len(server.requests) == 4
    assert [path.suffix for path in copies(tmp_path)] == [".tar"] * 4


def _read_small(folder: Path, url: str, seed: int, max_gb: float, results: Any) -> None:
    cache = ShardCache(folder, wait_s=0.01, max_gb=max_gb)
    reader = ShardReader([Shard(f"{url}/d/s-{place:03d}.tar", 2) for place in range(4)], cache, max_open=1)
    results.put([reader.record((seed + turn) % 4, 1)["__key__"] for turn in range(20)])


def test_a_cache_too_small_for_its_readers_is_slow_but_right(server: FlakyServer, tmp_path: Path) -> None:
    """Every shard is removed while others ask for it; nobody gets wrong bytes, and the cap holds."""
    limit = 1.2 * max(map(len, server.files.values()))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=_read_small, args=(tmp_path / "cache", server.url, seed, limit / 1e9, results))
        for seed in range(4)
    ]
    for worker in workers:
        worker.start()
    largest, found = 0, []
    while len(found) < 4:
        if not results.empty():
            found.append(results.get())
        folder = tmp_path / "cache"
        sizes = [path.stat().st_size for path in folder.glob("*.tar") if path.exists()] if folder.exists() else []
        largest = max(largest, sum(sizes))
        time.sleep(0.002)
    for worker in workers:
        worker.join()
    keys = ["r000001", "r000004", "r000008", "r000013"]
    assert sorted(found) == sorted([[keys[(seed + turn) % 4] for turn in range(20)] for seed in range(4)])
    assert largest <= limit + 2 * max(map(len, server.files.values()))
