"""Retrieval against naive pair-by-pair loops: ranking, re-ranking, records of one image, pictures, odd input."""

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_world import COLORS, identity, make_record, make_stage1, make_tokenizer, write_records
from PIL import Image

from blip2train.benchmark.rerank import candidates, reranked
from blip2train.benchmark.retrieval import RetrievalBenchmark
from blip2train.data.sample import read_eval_items
from blip2train.errors import DataError
from blip2train.model.blip2_stage1 import Blip2Stage1

CPU = torch.device("cpu")


def _benchmark(urls: list[str], **changes: Any) -> RetrievalBenchmark:
    options: dict[str, Any] = {"rerank_top_k": 3, "batch_size": 4, "pair_batch_size": 7}
    return RetrievalBenchmark("tiny", urls, identity, make_tokenizer(), **(options | changes))


@pytest.fixture
def urls(tmp_path: Path) -> list[str]:
    """Twelve images whose one to three captions are all different, so that no two scores tie."""
    words = ("a", "the", "square", "is", "what", "color", "of", "question", "answer", "red", "green", "blue")
    records = [
        make_record(
            f"img{i:02}", list(COLORS)[i % 4], [" ".join((words[i], words[j]) * j) for j in range(1, 2 + i % 3)]
        )
        for i in range(12)
    ]
    return write_records(tmp_path, records)


@torch.no_grad()
def _naive_scores(model: Blip2Stage1, urls: list[str]) -> tuple[list[list[float]], list[list[float]], list[int]]:
    """Similarity and match logit of every pair, one pair at a time, and each text's image."""
    model.eval()
    items = list(read_eval_items(urls, identity))
    texts = [(index, text) for index, item in enumerate(items) for text in item.captions]
    similarity, matching = [], []
    for item in items:
        tokens = model.image_tokens(item.image[None])
        features = model.image_features(model.encode_image(tokens).hidden)[0]
        similarity.append([])
        matching.append([])
        for _, text in texts:
            ids, mask = make_tokenizer()([text], 32)
            text_feature = model.text_features(ids, mask)[0]
            similarity[-1].append(max(float(query @ text_feature) for query in features))
            matching[-1].append(float(model.matching_logits(tokens, ids, mask)[0, 1]))
    return similarity, matching, [index for index, _ in texts]


def _naive_recall(order_of: list[list[int]], right: list[set[int]], k: int) -> float:
    hits = sum(bool(set(order[:k]) & good) for order, good in zip(order_of, right, strict=True))
    return 100.0 * hits / len(right)


def _naive_metrics(model: Blip2Stage1, urls: list[str], top_k: int, add_similarity: bool) -> dict[str, float]:
    similarity, matching, owner = _naive_scores(model, urls)
    images, texts = range(len(similarity)), range(len(owner))
    i2t = [sorted(texts, key=lambda t, i=i: -similarity[i][t]) for i in images]
    t2i = [sorted(images, key=lambda i, t=t: -similarity[i][t]) for t in texts]

    def final(i: int, t: int) -> float:
        return matching[i][t] + (similarity[i][t] if add_similarity else 0.0)

    i2t_itm = [sorted(row[:top_k], key=lambda t, i=i: -final(i, t)) + row[top_k:] for i, row in enumerate(i2t)]
    t2i_itm = [sorted(row[:top_k], key=lambda i, t=t: -final(i, t)) + row[top_k:] for t, row in enumerate(t2i)]
    right_texts = [{t for t in texts if owner[t] == i} for i in images]
    right_images = [{owner[t]} for t in texts]
    result = {}
    for k in (1, 5, 10):
        result[f"text_recall@{k}"] = _naive_recall(i2t, right_texts, k)
        result[f"image_recall@{k}"] = _naive_recall(t2i, right_images, k)
        result[f"text_recall@{k}_itm"] = _naive_recall(i2t_itm, right_texts, k)
        result[f"image_recall@{k}_itm"] = _naive_recall(t2i_itm, right_images, k)
    return result


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("add_similarity", [True, False])
def test_metrics_equal_a_loop_over_single_pairs(urls: list[str], seed: int, add_similarity: bool) -> None:
    model = make_stage1(seed)
    result = _benchmark(urls, add_similarity=add_similarity).run(model, CPU)
    expected = _naive_metrics(model, urls, top_k=3, add_similarity=add_similarity)
    assert {key: result.metrics[key] for key in expected} == pytest.approx(expected)
    assert result.metrics["candidates"] == 12
    assert result.metrics["chance"] == pytest.approx(100 / 12)


def test_rows_agree_with_the_metrics(urls: list[str]) -> None:
    result = _benchmark(urls).run(make_stage1(), CPU)
    for direction, side in (("image_to_text", "text"), ("text_to_image", "image")):
        rows = [row for row in result.predictions if row["direction"] == direction]
        for k in (1, 5, 10):
            share = 100 * sum(row["rank"] <= k for row in rows) / len(rows)
            share_itc = 100 * sum(row["rank_itc"] <= k for row in rows) / len(rows)
            assert share == pytest.approx(result.metrics[f"{side}_recall@{k}_itm"])
            assert share_itc == pytest.approx(result.metrics[f"{side}_recall@{k}"])
        assert all(row["retrieved"][0]["right"] == (row["rank"] == 1) for row in rows)
        assert all(len(row["retrieved"]) == 5 for row in rows)


def test_without_reranking_nothing_is_called_itm(urls: list[str]) -> None:
    result = _benchmark(urls, rerank_top_k=0).run(make_stage1(), CPU)
    assert not [key for key in result.metrics if key.endswith("_itm")]
    assert all(row["rank"] == row["rank_itc"] for row in result.predictions)


def test_batch_sizes_and_cache_do_not_change_the_result(urls: list[str]) -> None:
    model = make_stage1()
    expected = _benchmark(urls).run(model, CPU)
    for changes in ({"batch_size": 1, "pair_batch_size": 1}, {"batch_size": 100, "pair_batch_size": 1000}):
        assert _benchmark(urls, **changes).run(model, CPU).metrics == pytest.approx(expected.metrics)
    halved = _benchmark(urls, cache_dtype="float16").run(model, CPU)
    assert halved.metrics["image_recall@10"] == expected.metrics["image_recall@10"]


def test_records_of_one_image_are_one_candidate_with_all_its_captions(tmp_path: Path) -> None:
    whole = write_records(
        tmp_path / "a", [make_record("x", "red", ["a red square", "red"]), make_record("y", "blue", ["blue"])]
    )
    key, image, fields = make_record("x", "red", ["a red square"], image_id=7)
    split = write_records(
        tmp_path / "b",
        [(key, image, fields), make_record("y", "blue", ["blue"]), ("x2", image, {"captions": ["red"], "image_id": 7})],
    )
    model = make_stage1()
    assert _benchmark(split).run(model, CPU).metrics == _benchmark(whole).run(model, CPU).metrics


def test_equal_captions_of_different_images_tie_exactly_and_cost_what_chance_does(tmp_path: Path) -> None:
    urls = write_records(tmp_path, [make_record(name, "red", ["A red square!"]) for name in "abcd"])
    result = _benchmark(urls, rerank_top_k=4).run(make_stage1(), CPU)
    for metric in ("text_recall@1", "text_recall@1_itm"):
        assert result.metrics[metric] == pytest.approx(25.0)
    rows = [row for row in result.predictions if row["direction"] == "image_to_text"]
    assert all(row["rank"] == 1 and row["retrieved"][0]["right"] for row in rows)


def test_limit_counts_records(urls: list[str]) -> None:
    assert _benchmark(urls, limit=5).run(make_stage1(), CPU).metrics["candidates"] == 5


def test_ceiling_sees_captions_and_truth_but_no_pixels(tmp_path: Path) -> None:
    urls = write_records(tmp_path, [make_record(name, "red", [name], scene={"name": name}) for name in "ab"])

    def ceiling(items: Any) -> dict[str, float]:
        assert [item.extra["scene"]["name"] for item in items] == ["a", "b"]
        assert all(item.image.numel() == 0 and item.captions for item in items)
        return {"image_recall@1_ceiling": 50.0}

    assert _benchmark(urls, ceiling=ceiling).run(make_stage1(), CPU).metrics["image_recall@1_ceiling"] == 50.0


def test_pictures_are_bounded_and_cover_every_shown_row(urls: list[str]) -> None:
    result = _benchmark(urls, num_pictures=8).run(make_stage1(), CPU)
    assert 0 < len(result.images) <= 8
    assert Image.open(BytesIO(next(iter(result.images.values())))).size == (8, 8)
    shown = [row for row in result.predictions if row.get("shown")]
    assert {row["direction"] for row in shown} == {"image_to_text", "text_to_image"}
    for row in shown:
        assert {row["key"], *(entry["key"] for entry in row["retrieved"] if "key" in entry)} <= set(result.images)


def test_progress_grows_to_its_total_and_the_model_keeps_its_mode(urls: list[str]) -> None:
    seen: list[tuple[int, int | None]] = []
    model = make_stage1().train()
    _benchmark(urls).run(model, CPU, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert model.training


def test_an_image_without_captions_is_refused(tmp_path: Path) -> None:
    urls = write_records(tmp_path, [make_record("x", "red", ["red"]), make_record("bare", "blue", [])])
    with pytest.raises(DataError, match="bare"):
        _benchmark(urls).run(make_stage1(), CPU)


def test_reranked_scores_keep_the_order_of_what_was_not_chosen_however_close() -> None:
    similarity = torch.tensor([[0.5, 0.5 - 1e-6, 0.9, 0.8]])
    matching = torch.tensor([[0.0, 0.0, -700.0, 800.0]])
    chosen, _ = candidates(similarity, 2)
    assert chosen.tolist() == [[False, False, True, True]]
    scores = reranked(similarity, matching, chosen, add_similarity=True)
    assert scores[0].argsort(descending=True).tolist() == [3, 2, 0, 1]
