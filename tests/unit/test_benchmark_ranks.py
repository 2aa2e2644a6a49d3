"""Two gloo ranks give what one process gives: every image and question once, in the same order, on both ranks."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from benchmark_world import (
    COLORS,
    ScriptedStage2,
    identity,
    make_language_tokenizer,
    make_record,
    make_stage1,
    make_tokenizer,
    write_records,
)

from blip2train.benchmark.base import BenchmarkResult
from blip2train.benchmark.captioning import CaptioningBenchmark
from blip2train.benchmark.retrieval import RetrievalBenchmark
from blip2train.benchmark.vqa import VqaBenchmark
from blip2train.model.language_model.base import GenerationSettings

CPU = torch.device("cpu")
SETTINGS = GenerationSettings(max_new_tokens=3)


def _retrieval(urls: list[str], limit: int | None = None) -> BenchmarkResult:
    return RetrievalBenchmark("tiny", urls, identity, make_tokenizer(), 3, 2, limit=limit).run(make_stage1(), CPU)


def _caption(urls: list[str], limit: int | None = None) -> BenchmarkResult:
    return CaptioningBenchmark("tiny", urls, identity, make_language_tokenizer(), SETTINGS, limit=limit).run(
        ScriptedStage2(), CPU
    )


def _vqa(urls: list[str], limit: int | None = None) -> BenchmarkResult:
    return VqaBenchmark("tiny", urls, identity, make_language_tokenizer(), SETTINGS, limit=limit).run(
        ScriptedStage2(), CPU
    )


RUNS: dict[str, Callable[..., BenchmarkResult]] = {"retrieval": _retrieval, "caption": _caption, "vqa": _vqa}


def _records(folder: Path) -> list[str]:
    """Seven records of six images, an odd number for two ranks: the first image comes twice."""
    names = list(COLORS)
    records = []
    for index in range(6):
        color = names[index % len(names)]
        questions = [{"question_id": str(index), "question": "what ?", "answers": [color], "kind": color}]
        captions = [f"a {color} square {names[index % 3]}", f"the {color}" * (1 + index)]
        records.append(make_record(f"img{index}", color, captions, image_id=100 + index, questions=questions))
    records.append(("again", records[0][1], {"captions": ["question answer"], "image_id": 100}))
    return write_records(folder, records)


def _rank_main(rank: int, port: int, urls: list[str], out: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, run in RUNS.items():
        result = run(urls)
        found[name] = {"metrics": result.metrics, "rows": result.predictions, "pictures": sorted(result.images)}
    found["single"] = {name: len(run(urls, limit=1).predictions) for name, run in RUNS.items()}
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    urls = _records(folder / "data")
    context = torch.multiprocessing.get_context("fork")
    port = _free_port()
    processes = [context.Process(target=_rank_main, args=(rank, port, urls, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return urls, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_give_the_numbers_and_rows_of_one(ranks: tuple[list[str], list[dict[str, Any]]], name: str) -> None:
    urls, (first, second) = ranks
    expected = RUNS[name](urls)
    assert first[name] == second[name]
    assert first[name]["pictures"] == sorted(expected.images)
    # which image is the shuffled one depends on how the records are dealt to ranks
    loose = {"vqa_shuffled"}
    plain = {key: value for key, value in expected.metrics.items() if key.split("/")[0] not in loose}
    assert {key: value for key, value in first[name]["metrics"].items() if key in plain} == pytest.approx(plain)
    fields = ("key", "image_id", "direction", "text", "rank", "rank_itc", "prediction", "question_id", "references")
    for row, other in zip(expected.predictions, first[name]["rows"], strict=True):
        assert {key: row.get(key) for key in fields} == {key: other.get(key) for key in fields}


def test_two_ranks_score_every_image_once(ranks: tuple[list[str], list[dict[str, Any]]]) -> None:
    _, (first, _) = ranks
    assert first["retrieval"]["metrics"]["candidates"] == 6
    assert [row["key"] for row in first["caption"]["rows"]] == [f"img{index}" for index in range(6)]
    assert len(first["caption"]["rows"][0]["references"]) == 3
    assert first["vqa"]["metrics"]["questions"] == 6


def test_a_rank_without_any_record_takes_part(ranks: tuple[list[str], list[dict[str, Any]]]) -> None:
    _, found = ranks
    for results in found:
        # one image and its two texts; one caption; one question
        assert results["single"] == {"retrieval": 3, "caption": 1, "vqa": 1}
