"""Image captioning: stage-2 model -> CIDEr, BLEU, ROUGE-L and exact truth where it is known (paper, Table 3).

One caption per image, scored against all its references. Beside each score stands the shuffled control: the caption of
another image, which needs no second generation. LAVIS injects a repetition penalty in its task; here every decoding
setting is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from blip2train.batch import EvalItem
from blip2train.benchmark.base import (
    BenchmarkResult,
    Prediction,
    Progress,
    evaluating,
    percent,
    share_of_records,
    windows,
)
from blip2train.benchmark.prompting import generate_texts, visual_prompts
from blip2train.benchmark.shuffle import other_image
from blip2train.benchmark.thumbnail import gather_pictures, read_with_pictures
from blip2train.data.image_transform import Transform
from blip2train.data.tokenizer import LanguageModelTokenizer
from blip2train.distributed import gather_objects, rank, world_size
from blip2train.errors import DataError
from blip2train.metric.caption import caption_scores
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.language_model.base import GenerationSettings

Judge = Callable[[str, Mapping[str, Any]], dict[str, float]]


class CaptioningBenchmark:
    """Captions of every image, scored against references and, where given, against the truth itself.

    Metrics: `caption_cider`, `caption_bleu_1` to `_4`, `caption_rouge_l` on the scale of coco-caption (a CIDEr of 1.0
    is what papers print as 100); `caption_<key>` in percent for each key of `judge`; all of them again with `_shuffled`
    (another image's caption) and `caption_cider_blind` (the caption that comes without any image).

    Args:
        urls: shards; every record is one image with its reference captions.
        transform: the encoder's evaluation transform.
        settings: decoding; the paper uses beam width 5.
        prompt: text after the visual prompt; the paper fine-tunes and evaluates with "a photo of".
        batch_size: images per generation.
        limit: at most so many records.
        judge: exact truth of a caption given the record's `extra`, each value from 0 to 1; a key may be missing where
            it does not apply.
        shuffled: score the captions of other images too.
        blind: score the caption that the language model gives without an image.
        max_prompt_tokens: longer prompts are cut.
        seed: which other image the shuffled control takes.
        num_pictures: how many images are kept for the report.
    """

    stage = 2

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        transform: Transform,
        tokenizer: LanguageModelTokenizer,
        settings: GenerationSettings,
        prompt: str = "",
        batch_size: int = 32,
        limit: int | None = None,
        judge: Judge | None = None,
        shuffled: bool = True,
        blind: bool = False,
        max_prompt_tokens: int = 32,
        seed: int = 0,
        num_pictures: int = 48,
    ) -> None:
        self.name, self.urls, self.transform, self.tokenizer = name, list(urls), transform, tokenizer
        self.settings, self.prompt, self.batch_size, self.limit = settings, prompt, batch_size, limit
        self.judge, self.shuffled, self.blind = judge, shuffled, blind
        self.max_prompt_tokens, self.seed, self.num_pictures = max_prompt_tokens, seed, num_pictures

    def run(self, model: Blip2Stage2, device: torch.device, progress: Progress | None = None) -> BenchmarkResult:
        local: list[Prediction] = []
        pictures: dict[str, bytes] = {}
        extras: list[Mapping[str, Any]] = []
        total = share_of_records(self.urls, self.limit)
        with evaluating(model):
            items = read_with_pictures(self.urls, self.transform, self.limit, pictures)
            for window in windows(items, self.batch_size):
                for item, caption in zip(window, self._captions(model, window, device), strict=True):
                    position = len(local) * world_size() + rank()
                    local.append(_row(item, caption) | {"position": position})
                    extras.append(item.extra)
                if progress is not None:
                    progress(len(local), total)
            blind = self._generate(model, [self.prompt], None, device)[0] if self.blind else None
        rows, all_extras = _merge(list(zip(local, extras, strict=True)), self.name)
        metrics = self._score(rows, all_extras, blind)
        shown = _choose_shown(rows, self.num_pictures)
        return BenchmarkResult(metrics, rows, gather_pictures(pictures, shown))

    def _captions(self, model: Blip2Stage2, window: Sequence[EvalItem], device: torch.device) -> list[str]:
        visual_BQL = visual_prompts(model, window, device, self.batch_size)
        return self._generate(model, [self.prompt] * len(window), visual_BQL, device)

    def _generate(
        self, model: Blip2Stage2, prompts: Sequence[str], visual: torch.Tensor | None, device: torch.device
    ) -> list[str]:
        return generate_texts(
            model,
            self.tokenizer,
            prompts,
            visual,
            self.settings,
            device=device,
            batch_size=self.batch_size,
            max_tokens=self.max_prompt_tokens,
        )

    def _score(
        self, rows: list[Prediction], extras: Sequence[Mapping[str, Any]], blind: str | None
    ) -> dict[str, float]:
        """Fill the rows' scores in place and return the metrics."""
        metrics = self._score_as(rows, extras, "prediction", "")
        others = other_image([row["image_id"] for row in rows], self.seed)
        if self.shuffled and len(rows) > 1:
            for row, other in zip(rows, others, strict=True):
                row |= {"shuffled": rows[other]["prediction"], "shuffled_key": rows[other]["key"]}
            metrics |= self._score_as(rows, extras, "shuffled", "_shuffled")
        if blind is not None:
            references = [row["references"] for row in rows]
            metrics["caption_cider_blind"] = caption_scores([blind] * len(rows), references).overall["cider"]
            for row in rows:
                row["blind"] = blind
        return metrics

    def _score_as(
        self, rows: list[Prediction], extras: Sequence[Mapping[str, Any]], field: str, suffix: str
    ) -> dict[str, float]:
        scores = caption_scores([row[field] for row in rows], [row["references"] for row in rows])
        metrics = {f"caption_{key}{suffix}": value for key, value in scores.overall.items()}
        for row, cider in zip(rows, scores.cider_per_image, strict=True):
            row[f"cider{suffix}"] = round(cider, 4)
        if self.judge is None:
            return metrics
        verdicts = [self.judge(row[field], extra) for row, extra in zip(rows, extras, strict=True)]
        for row, verdict in zip(rows, verdicts, strict=True):
            row[f"verdict{suffix}"] = verdict
        keys = dict.fromkeys(key for verdict in verdicts for key in verdict)
        return metrics | {
            f"caption_{key}{suffix}": percent(verdict[key] for verdict in verdicts if key in verdict) for key in keys
        }


def _row(item: EvalItem, caption: str) -> Prediction:
    return {
        "key": item.key,
        "image_id": item.image_id,
        "prediction": caption,
        "references": list(item.captions),
    }


def _merge(
    local: list[tuple[Prediction, Mapping[str, Any]]], name: str
) -> tuple[list[Prediction], list[Mapping[str, Any]]]:
    """All ranks' rows in record order; records of one image become one row with all their references."""
    merged: dict[int, tuple[Prediction, Mapping[str, Any]]] = {}
    for row, extra in sorted(gather_objects(local), key=lambda entry: entry[0]["position"]):
        first, _ = merged.setdefault(row["image_id"], (row, extra))
        first["references"] = list(dict.fromkeys(first["references"] + row["references"]))
    for row, _ in merged.values():
        del row["position"]
        if not row["references"]:
            raise DataError(
                "an image without reference captions cannot be scored",
                where=f"benchmark {name}, record {row['key']}",
                fix="leave the record out of the benchmark's shards",
            )
    if not merged:
        raise DataError("no image to caption", where=f"benchmark {name}", fix="check that the shards hold records")
    return [row for row, _ in merged.values()], [extra for _, extra in merged.values()]


def _choose_shown(rows: list[Prediction], budget: int) -> set[str]:
    """Mark up to `budget` rows for the report: the worst and the best by CIDEr in turn, so that both are seen."""
    ordered = sorted(rows, key=lambda row: row["cider"])
    half = (len(ordered) + 1) // 2
    by_turns = [row for pair in zip(ordered[:half], ordered[half:][::-1], strict=False) for row in pair]
    for row in by_turns[:budget]:
        row["shown"] = True
    return {row["key"] for row in by_turns[:budget]}
