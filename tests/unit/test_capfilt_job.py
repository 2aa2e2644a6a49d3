"""The folder that processes fill together: kills, repetitions and neighbours change no byte of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from web_shards import write_web_shards

from blip2train.capfilt.finish import finish
from blip2train.capfilt.job import Job
from blip2train.capfilt.ranker import Ranking
from blip2train.capfilt.shard import ShardResult, ShardSettings, process_shard
from blip2train.data.shards import Shard, open_shards, read_shard
from blip2train.errors import DataError

SIZES = [5, 3, 6, 4]


def captions(images: Sequence[Tensor], keys: Sequence[str]) -> list[list[str]]:
    return [[f"a dog {key}", f"a cat {key}"] for key in keys]


def by_length(images: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> Ranking:
    return Ranking([[len(text) / 100 for text in row] for row in texts], 0)


def processing(seconds: float = 0.0, done: list[str] | None = None) -> Callable[..., ShardResult]:
    def slow(images: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> Ranking:
        time.sleep(seconds)
        return by_length(images, texts)

    def process(shard: Shard, out: Path, progress: Callable[[int], None]) -> ShardResult:
        result = process_shard(shard, out, captions, slow, ShardSettings(batch_size=2), progress)
        if done is not None:
            done.append(Path(shard.url).name)
        return result

    return process


def job(urls: list[str], out: Path, **identity: Any) -> Job:
    made = Job(open_shards(urls), out, {"captioner": {"model": "m", "seed": 0}} | identity)
    made.prepare()
    return made


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_web_shards(tmp_path_factory.mktemp("in"), SIZES, broken=[2, 9])


@pytest.fixture(scope="module")
def expected(urls: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("one") / "data"
    whole = job(urls, out)
    whole.work(processing(), 0, 1, lambda: None)
    finish(whole, 1.0)
    return content(out)


def test_a_finished_folder_is_a_data_set_that_accounts_for_every_record(expected: dict[str, bytes]) -> None:
    names = [f"shard-{number:06d}.tar" for number in range(4)]
    assert set(expected) == {*names, "index.json", "manifest.json", "report.json", "drops.jsonl"}
    manifest, index = json.loads(expected["manifest.json"]), json.loads(expected["index.json"])
    assert [row["name"] for row in index["shards"]] == names
    assert manifest["num_records"] == index["num_records"] == sum(SIZES) - 2
    assert (manifest["num_dropped"], manifest["dropped"]) == (2, {"corrupt_image": 2})
    assert [json.loads(line)["key"] for line in expected["drops.jsonl"].splitlines()] == ["000000002", "000000009"]
    assert [Path(row["source"]).name for row in manifest["shards"]] == [f"{n:05d}.tar" for n in range(4)]
    assert manifest["counts"]["images"] == 16


def test_killed_anywhere_the_same_call_continues_to_the_same_bytes(
    urls: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(6):
        victim = context.Process(
            target=lambda: job(urls, tmp_path / "out").work(processing(0.03), 0, 1, lambda: None), daemon=True
        )
        victim.start()
        time.sleep(0.05 + 0.04 * number)
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
    last = job(urls, tmp_path / "out")
    done: list[str] = []
    last.work(processing(done=done), 0, 1, lambda: None)
    finish(last, 1.0)
    assert content(tmp_path / "out") == expected


def test_what_a_killed_process_left_half_written_goes(
    urls: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "out" / ".capfilt").mkdir(parents=True)
    whole = job(urls, tmp_path / "out")
    (tmp_path / "out" / ".shard-000001.tar.4711.partial").write_bytes(b"half")
    whole.work(processing(), 0, 1, lambda: None)
    finish(whole, 1.0)
    assert content(tmp_path / "out") == expected


def test_processes_share_the_shards_and_none_is_done_twice(
    urls: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]

    def work(rank: int) -> None:
        done: list[str] = []
        job(urls, tmp_path / "out").work(processing(0.02, done), rank, 2, lambda: None)
        logs[rank].write_text(" ".join(done))

    workers = [context.Process(target=work, args=(rank,)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    done = [name for log in logs for name in log.read_text().split()]
    assert sorted(done) == [f"{number:05d}.tar" for number in range(4)]
    assert all(log.read_text() for log in logs)
    finish(job(urls, tmp_path / "out"), 1.0)
    assert content(tmp_path / "out") == expected


def test_a_process_takes_over_the_share_of_one_that_never_came(urls: list[str], tmp_path: Path) -> None:
    done: list[str] = []
    alone = job(urls, tmp_path / "out")
    alone.work(processing(done=done), 1, 2, lambda: None)
    assert done == ["00001.tar", "00003.tar", "00000.tar", "00002.tar"]
    assert alone.is_done()
    assert alone.num_read() == alone.num_records == sum(SIZES)


def test_the_next_own_shard_is_fetched_ahead(urls: list[str], tmp_path: Path) -> None:
    order: list[str] = []

    def fetch(shard: Shard) -> None:
        order.append(f"fetch {Path(shard.url).stem}")

    def process(shard: Shard, out: Path, progress: Callable[[int], None]) -> ShardResult:
        order.append(f"do {Path(shard.url).stem}")
        return processing()(shard, out, progress)

    job(urls, tmp_path / "out").work(process, 0, 2, lambda: None, fetch)
    assert order == ["fetch 00002", "do 00000", "do 00002", "do 00001", "do 00003"]


def test_progress_counts_shards_in_work_too(urls: list[str], tmp_path: Path) -> None:
    whole = job(urls, tmp_path / "out")
    seen: list[int] = []
    whole.work(processing(), 0, 1, lambda: seen.append(whole.num_read()))
    assert seen == sorted(seen)
    assert {2, 4, 5, 7, 8} <= set(seen), "two records at a time"
    assert seen[-1] == sum(SIZES)


def test_a_finished_job_does_nothing_again(urls: list[str], tmp_path: Path) -> None:
    job(urls, tmp_path / "out").work(processing(), 0, 1, lambda: None)
    done: list[str] = []
    job(urls, tmp_path / "out").work(processing(done=done), 0, 1, lambda: None)
    assert not done


def test_a_shard_that_somebody_deleted_is_done_again(
    urls: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    job(urls, tmp_path / "out").work(processing(), 0, 1, lambda: None)
    (tmp_path / "out" / "shard-000002.tar").unlink()
    again = job(urls, tmp_path / "out")
    assert not again.is_done()
    again.work(processing(), 0, 1, lambda: None)
    finish(again, 1.0)
    assert content(tmp_path / "out") == expected


def test_a_shard_without_a_usable_record_is_done_all_the_same(tmp_path: Path) -> None:
    inputs = write_web_shards(tmp_path / "in", [2, 3], broken=[0, 1])
    whole = job(inputs, tmp_path / "out")
    whole.work(processing(), 0, 1, lambda: None)
    assert whole.is_done()
    assert [row["name"] for row in finish(whole, 1.0)["shards"]] == ["shard-000001.tar"]


def stop_after(number: int) -> Callable[..., ShardResult]:
    """Does so many shards; writes one more, and is refused."""
    done: list[str] = []

    def process(shard: Shard, out: Path, progress: Callable[[int], None]) -> ShardResult:
        result = processing(done=done)(shard, out, progress)
        if len(done) > number:
            raise DataError("too many", where="here", fix="none")
        return result

    return process


@pytest.fixture
def begun(urls: list[str], tmp_path: Path) -> Path:
    """A folder with one shard done."""
    with pytest.raises(DataError, match="too many"):
        job(urls, tmp_path / "out").work(stop_after(1), 0, 1, lambda: None)
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["shard-000000.tar"]
    return tmp_path / "out"


@pytest.mark.parametrize("change", [{"captioner": {"model": "m", "seed": 1}}, {"rule": {"keep": 3}}])
def test_a_folder_begun_with_other_settings_is_refused_and_says_which(
    urls: list[str], begun: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=r"captioner\.seed: 0 there, 1 now|rule\.keep: None there, 3 now"):
        job(urls, begun, **change)


def test_other_inputs_are_refused(urls: list[str], begun: Path) -> None:
    with pytest.raises(DataError, match="inputs.num_shards"):
        job(urls[:2], begun)


def test_a_call_that_was_refused_in_its_first_shard_leaves_the_folder_to_corrected_ones(
    urls: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="too many"):
        job(urls[:2], tmp_path / "out").work(stop_after(0), 0, 1, lambda: None)
    (tmp_path / "out" / ".shard-000001.tar.4711.partial").write_bytes(b"half")
    corrected = job(urls, tmp_path / "out")
    assert not list((tmp_path / "out").glob(".shard*"))
    corrected.work(processing(), 0, 1, lambda: None)
    finish(corrected, 1.0)
    assert content(tmp_path / "out") == expected


def test_inputs_without_a_usable_record_leave_the_folder_to_corrected_ones(
    urls: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    wrong = job(write_web_shards(tmp_path / "in", [2, 3], broken=range(5)), tmp_path / "out")
    wrong.work(processing(), 0, 1, lambda: None)
    with pytest.raises(DataError):
        finish(wrong, 1.0)
    corrected = job(urls, tmp_path / "out")
    corrected.work(processing(), 0, 1, lambda: None)
    finish(corrected, 1.0)
    assert content(tmp_path / "out") == expected


def test_a_folder_whose_first_shard_is_in_work_is_not_begun_anew(urls: list[str], tmp_path: Path) -> None:
    def process(shard: Shard, out: Path, progress: Callable[[int], None]) -> ShardResult:
        with pytest.raises(DataError, match="inputs.num_shards"):
            job(urls[:2], tmp_path / "out")
        return processing()(shard, out, progress)

    job(urls, tmp_path / "out").work(process, 0, 1, lambda: None)


def test_a_call_whose_folder_was_begun_anew_before_its_first_shard_does_none(urls: list[str], tmp_path: Path) -> None:
    slow = job(urls, tmp_path / "out")
    job(urls[:2], tmp_path / "out")
    with pytest.raises(DataError, match="another call has begun this folder anew"):
        slow.work(processing(), 0, 1, lambda: None)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_folder_with_another_data_set_is_left_alone(urls: list[str], tmp_path: Path) -> None:
    other = Path(write_web_shards(tmp_path / "out", [2])[0])
    before = other.read_bytes()
    with pytest.raises(DataError, match="holds another data set"):
        job(urls, tmp_path / "out")
    assert other.read_bytes() == before


def test_unfinished_work_is_not_finished(urls: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shards are missing"):
        finish(job(urls, tmp_path / "out"), 1.0)


def test_too_many_records_that_cannot_be_used_are_an_error_with_their_causes(tmp_path: Path) -> None:
    broken = write_web_shards(tmp_path / "in", [60, 60], broken=range(0, 120, 5))
    whole = job(broken, tmp_path / "out")
    whole.work(processing(), 0, 1, lambda: None)
    with pytest.raises(DataError, match=r"24 of 120 records cannot be used \(24 corrupt_image\)"):
        finish(whole, 0.1)
    assert finish(whole, 0.2)["num_records"] == 96


def test_output_shards_are_read_as_any_others(expected: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in expected.items():
        (tmp_path / name).write_bytes(data)
    shards = open_shards(str(tmp_path))
    assert [shard.num_records for shard in shards] == [4, 3, 5, 4]
    assert [len(list(read_shard(shard))) for shard in shards] == [4, 3, 5, 4]
