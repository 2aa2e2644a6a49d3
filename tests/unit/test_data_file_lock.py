"""A lock has one holder; on a disk without locks each user of them does what its module says, and nothing is lost."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from shard_factory import write_shards
from torch import Tensor

from blip2train.batch import ImageSpec
from blip2train.capfilt.example import Examples
from blip2train.capfilt.job import Job
from blip2train.capfilt.shard import ShardResult
from blip2train.capfilt.statistics import Statistics
from blip2train.data.drop import DropLedger
from blip2train.data.feature_writer import FeatureWriter
from blip2train.data.file_lock import release_lock, take_lock
from blip2train.data.image_transform import EvalTransform
from blip2train.data.pack_state import PackFolder
from blip2train.data.shards import Shard, ShardCache, ShardReader, open_shards
from blip2train.errors import DataError


def test_one_holds_it_until_it_closes_the_file_or_gives_it_back(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as first, path.open("w") as second:
        assert take_lock(first) and not take_lock(second)
        release_lock(first)
        assert take_lock(second.fileno()) and not take_lock(first)
    with path.open("w") as third:
        assert take_lock(third, wait=True)


def test_a_forked_process_does_not_keep_what_was_given_back(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as file:
        assert take_lock(file)
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
        try:
            release_lock(file)
            with path.open("w") as other:
                assert take_lock(other)
        finally:
            child.kill()
            child.join()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # what Lustre says where it was mounted without flock

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_capfilt_gives_every_process_its_own_share(no_locks: None, tmp_path: Path) -> None:
    job = Job(open_shards(list(map(str, write_shards(tmp_path / "in", [1] * 4)))), tmp_path / "out", {})
    job.prepare()
    done: list[str] = []

    def process(shard: Shard, out: Path, note: object) -> ShardResult:
        done.append(Path(shard.url).name)
        return ShardResult(None, 1, [], Statistics(), Examples())

    job.work(process, 0, 2, lambda: None)
    assert done == ["s-000.tar", "s-002.tar"] and not job.is_done()
    job.work(process, 1, 2, lambda: None)
    assert done[2:] == ["s-001.tar", "s-003.tar"] and job.is_done()


def test_without_locks_packing_and_encoding_go_on_with_a_word(
    no_locks: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), PackFolder(tmp_path / "packed", {"source": "x", "settings": {}}):
        assert "packed is on a disk without locks (" in caplog.text

    def tokens(images: Tensor) -> Tensor:
        return torch.zeros(len(images), 4, 48, dtype=torch.uint8)

    transform = EvalTransform(ImageSpec(8, (0.5,) * 3, (0.5,) * 3))
    writer = FeatureWriter(transform, tokens, batch_size=4, num_threads=1, ledger=DropLedger(["pets"]))
    source = Shard(str(write_shards(tmp_path / "in", [3])[0]), 3)
    assert writer.write("pets", ShardReader([source]), tmp_path / "cache")
    assert "cache is on a disk without locks (" in caplog.text


def test_without_locks_a_cache_of_remote_shards_is_refused_and_no_record_dropped(
    no_locks: None, tmp_path: Path
) -> None:
    source = write_shards(tmp_path / "in", [1])[0]
    reader = ShardReader([Shard(f"file://{source}", 1)], ShardCache(tmp_path / "cache"))
    with pytest.raises(DataError, match="a cache folder on a disk without locks"):
        reader.record(0, 0)
