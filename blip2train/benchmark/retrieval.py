"""Image-text retrieval in both directions: stage-1 model -> recalls, with and without ITM re-ranking (paper, Table 5).

Similarity is the best of the 32 queries; the top k are re-ranked by the matching head. LAVIS needs k = 128, 364-pixel
images and a recipe in the dataset class; here they are arguments. The chance level is stored beside every result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from blip2train.batch import EvalItem
from blip2train.benchmark.base import BenchmarkResult, Prediction, Progress, evaluating
from blip2train.benchmark.gallery import Gallery, LocalImages, build_gallery, encode_images, similarity
from blip2train.benchmark.rerank import candidates, different_pairs, matching_scores, reranked
from blip2train.benchmark.thumbnail import gather_pictures, read_with_pictures
from blip2train.data.image_transform import Transform
from blip2train.data.tokenizer import QFormerTokenizer
from blip2train.distributed import world_size
from blip2train.metric.retrieval import recall_at_k
from blip2train.model.blip2_stage1 import Blip2Stage1

Ceiling = Callable[[Sequence[EvalItem]], dict[str, float]]
SHOWN_RETRIEVED = 5


class RetrievalBenchmark:
    """Recall@1/5/10 from texts to images and back, in percent.

    Metrics: `text_recall@k` (an image finds one of its texts), `image_recall@k` (a text finds its image), the same with
    `_itm` after re-ranking, `candidates` (number of images), `chance` (recall@1 of a random order) and whatever
    `ceiling` returns.

    Args:
        urls: shards; every record is one image with its captions.
        transform: the encoder's evaluation transform.
        rerank_top_k: candidates per query that the matching head re-orders; 0 leaves re-ranking out.
        batch_size: images or texts per forward pass.
        pair_batch_size: image-text pairs per forward pass of the matching head.
        limit: at most so many records.
        add_similarity: final score = match logit + similarity, as LAVIS (its published numbers); else the logit alone.
        max_tokens: text length in tokens; LAVIS uses 35 for retrieval.
        clean: clean captions as in training.
        cache_dtype: type in which image tokens wait for re-ranking; "float16" halves the memory.
        ceiling: best reachable recall from the truth, where captions are ambiguous; gets items without pixels.
        num_pictures: how many images are kept for the report.
    """

    stage = 1

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        transform: Transform,
        tokenizer: QFormerTokenizer,
        rerank_top_k: int = 128,
        batch_size: int = 64,
        pair_batch_size: int = 256,
        limit: int | None = None,
        add_similarity: bool = True,
        max_tokens: int = 35,
        clean: bool = True,
        cache_dtype: str = "float32",
        ceiling: Ceiling | None = None,
        num_pictures: int = 48,
    ) -> None:
        self.name, self.urls, self.transform, self.tokenizer = name, list(urls), transform, tokenizer
        self.rerank_top_k, self.batch_size, self.limit = rerank_top_k, batch_size, limit
        self.pair_batch_size = pair_batch_size
        self.add_similarity, self.max_tokens, self.clean = add_similarity, max_tokens, clean
        self.cache_dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[cache_dtype]
        self.ceiling, self.num_pictures = ceiling, num_pictures

    def run(self, model: Blip2Stage1, device: torch.device, progress: Progress | None = None) -> BenchmarkResult:
        work, pictures = _Work(progress), dict[str, bytes]()
        with evaluating(model):
            items = read_with_pictures(self.urls, self.transform, self.limit, pictures)
            local = encode_images(model, items, device, self.batch_size, self.cache_dtype, work.advance)
            gallery = build_gallery(
                model, local, self.tokenizer, device, self.batch_size, self.max_tokens, self.clean, work.advance
            )
            similarity_NM = similarity(gallery, device)
            itm = self._rerank(model, local, gallery, similarity_NM, device, work)
        metrics = self._metrics(gallery, similarity_NM, itm)
        predictions = _rows(gallery, similarity_NM, itm)
        shown = _choose_shown(predictions, self.num_pictures)
        return BenchmarkResult(metrics, predictions, gather_pictures(pictures, shown))

    def _rerank(
        self,
        model: Blip2Stage1,
        local: LocalImages,
        gallery: Gallery,
        similarity_NM: Tensor,
        device: torch.device,
        work: _Work,
    ) -> tuple[Tensor, Tensor] | None:
        if self.rerank_top_k == 0:
            return None
        i2t_NM, t2i_NM = candidates(similarity_NM, self.rerank_top_k)
        wanted_NU = different_pairs(gallery, i2t_NM | t2i_NM)
        work.expect(int(wanted_NU.sum()) // world_size())
        matching_NM = matching_scores(model, local, gallery, wanted_NU, device, self.pair_batch_size, work.advance)
        return (
            reranked(similarity_NM, matching_NM, i2t_NM, self.add_similarity),
            reranked(similarity_NM, matching_NM, t2i_NM, self.add_similarity),
        )

    def _metrics(self, gallery: Gallery, similarity_NM: Tensor, itm: tuple[Tensor, Tensor] | None) -> dict[str, float]:
        metrics = dict(recall_at_k(similarity_NM, gallery.text_to_image))
        if itm is not None:
            recalls = recall_at_k(itm[0], gallery.text_to_image, scores_t2i=itm[1].T)
            metrics |= {f"{key}_itm": value for key, value in recalls.items()}
        metrics["candidates"] = len(gallery.items)
        metrics["chance"] = 100.0 / len(gallery.items)
        if self.ceiling is not None:
            metrics |= self.ceiling(gallery.items)
        return metrics


class _Work:
    """Counts finished forward rows for the progress callback; the total is known once the pairs are."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.done = progress, 0
        self.total: int | None = None

    def expect(self, remaining: int) -> None:
        self.total = self.done + remaining

    def advance(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


def _rows(gallery: Gallery, similarity_NM: Tensor, itm: tuple[Tensor, Tensor] | None) -> list[Prediction]:
    """One row per query: images first, then texts. Ranks count from 1; ties count for the query."""
    own_NM = gallery.text_to_image[None, :] == torch.arange(len(gallery.items))[:, None]
    final_i2t, final_t2i = itm if itm is not None else (similarity_NM, similarity_NM)
    rows = _image_rows(gallery, own_NM, similarity_NM, final_i2t)
    return rows + _text_rows(gallery, own_NM.T, similarity_NM.T, final_t2i.T)


def _image_rows(gallery: Gallery, own_NM: Tensor, itc_NM: Tensor, final_NM: Tensor) -> list[Prediction]:
    rank_itc, rank_final, best = _best_rank(itc_NM, own_NM), _best_rank(final_NM, own_NM), _best(final_NM, own_NM)
    return [
        {
            "direction": "image_to_text",
            "key": item.key,
            "image_id": item.image_id,
            "captions": list(item.captions),
            "rank_itc": rank_itc[index],
            "rank": rank_final[index],
            "retrieved": [
                {"text": gallery.texts[text], "right": right, "score": round(score, 4)}
                for score, right, text in best[index]
            ],
        }
        for index, item in enumerate(gallery.items)
    ]


def _text_rows(gallery: Gallery, own_MN: Tensor, itc_MN: Tensor, final_MN: Tensor) -> list[Prediction]:
    rank_itc, rank_final, best = _best_rank(itc_MN, own_MN), _best_rank(final_MN, own_MN), _best(final_MN, own_MN)
    described = [gallery.items[image] for image in gallery.text_to_image.tolist()]
    return [
        {
            "direction": "text_to_image",
            "key": item.key,
            "image_id": item.image_id,
            "text": gallery.texts[index],
            "rank_itc": rank_itc[index],
            "rank": rank_final[index],
            "retrieved": [
                {"key": gallery.items[image].key, "right": right, "score": round(score, 4)}
                for score, right, image in best[index]
            ],
        }
        for index, item in enumerate(described)
    ]


def _best(scores: Tensor, own: Tensor) -> list[list[tuple[float, bool, int]]]:
    """(score, is it right, column) of each row's best columns; among equal scores the right one comes first."""
    values, columns = scores.topk(min(4 * SHOWN_RETRIEVED, scores.shape[1]), dim=1)
    entries = zip(values.tolist(), own.gather(1, columns).tolist(), columns.tolist(), strict=True)
    rows = [sorted(zip(*row, strict=True), key=lambda entry: (-entry[0], not entry[1])) for row in entries]
    return [row[:SHOWN_RETRIEVED] for row in rows]


def _best_rank(scores: Tensor, own: Tensor) -> list[int]:
    best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    return [int(count) + 1 for count in (scores > best).sum(dim=1)]


def _choose_shown(rows: list[Prediction], budget: int) -> set[str]:
    """Mark rows for the report (`shown`), right and wrong by turns, both directions, within `budget` pictures."""
    keys: set[str] = set()
    for direction, share in (("text_to_image", 0.75), ("image_to_text", 1.0)):
        for row in _by_turns([row for row in rows if row["direction"] == direction]):
            needed = keys | _pictures_of(row)
            if len(needed) > share * budget:
                break
            keys, row["shown"] = needed, True
    return keys


def _pictures_of(row: dict[str, Any]) -> set[str]:
    return {row["key"]} | {entry["key"] for entry in row["retrieved"] if "key" in entry}


def _by_turns(rows: list[Prediction]) -> list[Prediction]:
    """Right and wrong queries in turn, one per image."""
    rows = list({row["key"]: row for row in reversed(rows)}.values())[::-1]
    right = [row for row in rows if row["rank"] == 1]
    wrong = [row for row in rows if row["rank"] > 1]
    paired = [row for pair in zip(right, wrong, strict=False) for row in pair]
    matched = len(paired) // 2
    return paired + right[matched:] + wrong[matched:]
