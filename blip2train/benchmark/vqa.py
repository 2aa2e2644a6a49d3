"""Visual question answering: stage-2 model -> open-ended answers and their accuracy (paper, section 4.1 and Table 2).

Each question is asked with its image and, as controls, without any image, with another image, and with the truth in
words instead of the image (the oracle: what the frozen language model could answer at best). LAVIS has none of these
controls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from blip2train.batch import EvalItem, Question
from blip2train.benchmark.base import (
    BenchmarkResult,
    Prediction,
    Progress,
    evaluating,
    mean_by,
    percent,
    share_of_records,
    windows,
)
from blip2train.benchmark.prompting import check_template, generate_texts, visual_prompts
from blip2train.benchmark.shuffle import other_image
from blip2train.benchmark.thumbnail import gather_pictures, read_with_pictures
from blip2train.data.caption import clean_question
from blip2train.data.image_transform import Transform
from blip2train.data.tokenizer import LanguageModelTokenizer
from blip2train.distributed import gather_objects, rank, world_size
from blip2train.errors import DataError
from blip2train.metric.vqa import answer_accuracy, exact_match_accuracy
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.language_model.base import GenerationSettings

Oracle = Callable[[Mapping[str, Any]], str]
Variant = Literal["official", "lavis", "exact"]


class VqaBenchmark:
    """Accuracy of generated answers, in percent, beside what the same model answers without the right image.

    Metrics: `vqa_accuracy`, `vqa_blind` (no visual prompt), `vqa_shuffled` (another image), `vqa_oracle` (a description
    in words, no image), each also as `<metric>/<kind>`; `chance` (always the most frequent answer), `chance_by_kind`
    (always the most frequent answer of the question's kind); `questions`; and `bridging_efficiency` =
    (accuracy - blind) / (oracle - blind), the share of what the language model could use that the image brings.

    Args:
        urls: shards; every record is one image with its questions.
        transform: the encoder's evaluation transform.
        settings: decoding; the paper uses beam width 5 and length penalty -1.
        prompt: template around `{question}`; the paper: "Question: {question} Answer:" for OPT,
            "Question: {question} Short answer:" for Flan-T5.
        variant: "official" (VQA evaluator of 2021), "lavis", or "exact" (GQA: equal after cleaning).
        clean: clean questions as LAVIS does before it fills the template.
        batch_size: images or questions per forward pass.
        limit: at most so many records.
        blind: also ask without an image.
        shuffled: also ask with another image.
        oracle: description of a record from its `extra`; put before the prompt, after it a space.
        window_size: images held at once; another image is drawn from the same window.
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
        prompt: str = "Question: {question} Answer:",
        variant: Variant = "official",
        clean: bool = True,
        batch_size: int = 64,
        limit: int | None = None,
        blind: bool = True,
        shuffled: bool = True,
        oracle: Oracle | None = None,
        window_size: int = 256,
        max_prompt_tokens: int = 128,
        seed: int = 0,
        num_pictures: int = 48,
    ) -> None:
        check_template(prompt, ["question"], where=f"prompt of benchmark {name}")
        self.name, self.urls, self.transform, self.tokenizer = name, list(urls), transform, tokenizer
        self.settings, self.prompt, self.variant, self.clean = settings, prompt, variant, clean
        self.batch_size, self.limit, self.blind, self.shuffled, self.oracle = batch_size, limit, blind, shuffled, oracle
        self.window_size, self.max_prompt_tokens = window_size, max_prompt_tokens
        self.seed, self.num_pictures = seed, num_pictures

    def run(self, model: Blip2Stage2, device: torch.device, progress: Progress | None = None) -> BenchmarkResult:
        local: list[Prediction] = []
        pictures: dict[str, bytes] = {}
        images_done, total = 0, share_of_records(self.urls, self.limit)
        with evaluating(model):
            items = read_with_pictures(self.urls, self.transform, self.limit, pictures)
            for window in windows(items, self.window_size):
                for row in self._answer(model, window, device):
                    position = (images_done + row.pop("item")) * world_size() + rank()
                    local.append(row | {"position": position})
                images_done += len(window)
                if progress is not None:
                    progress(images_done, total)
        rows = _merge(local, self.name)
        metrics = self._score(rows)
        shown = _choose_shown(rows, self.num_pictures)
        return BenchmarkResult(metrics, rows, gather_pictures(pictures, shown))

    def _answer(self, model: Blip2Stage2, window: Sequence[EvalItem], device: torch.device) -> list[Prediction]:
        asked = [(row, question) for row, item in enumerate(window) for question in item.questions]
        if not asked:
            return []
        prompts = [self._prompt(question.question) for _, question in asked]
        visual_NQL = visual_prompts(model, window, device, self.batch_size)
        own = torch.tensor([row for row, _ in asked], device=device)
        rows = [_row(window[row], row, question) for row, question in asked]

        def ask(field: str, texts: Sequence[str], visual: Tensor | None) -> None:
            answers = generate_texts(
                model,
                self.tokenizer,
                texts,
                visual,
                self.settings,
                device=device,
                batch_size=self.batch_size,
                max_tokens=self.max_prompt_tokens,
            )
            for row, answer in zip(rows, answers, strict=True):
                row[field] = answer

        ask("prediction", prompts, visual_NQL[own])
        if self.blind:
            ask("blind", prompts, None)
        others = other_image([item.image_id for item in window], self.seed)
        if self.shuffled and any(other != row for row, other in enumerate(others)):
            ask("shuffled", prompts, visual_NQL[torch.tensor(others, device=device)[own]])
            for row in rows:
                row["shuffled_key"] = window[others[row["item"]]].key
        if self.oracle is not None:
            descriptions = [self.oracle(item.extra) for item in window]
            told = [f"{descriptions[row]} {prompt}" for (row, _), prompt in zip(asked, prompts, strict=True)]
            ask("oracle", told, None)
        return rows

    def _prompt(self, question: str) -> str:
        return self.prompt.format(question=clean_question(question) if self.clean else question)

    def _accuracy(self, prediction: str, answers: Sequence[str]) -> float:
        if self.variant == "exact":
            return exact_match_accuracy([prediction], [answers]) / 100.0
        return answer_accuracy(prediction, answers, self.variant)

    def _score(self, rows: list[Prediction]) -> dict[str, float]:
        """Fill the rows' accuracies in place and return the metrics."""
        metrics: dict[str, float] = {"questions": len(rows)}
        for field, name in _FIELDS.items():
            answered = [row for row in rows if field in row]
            for row in answered:
                row[f"{field}_accuracy"] = self._accuracy(row[field], row["answers"])
            if answered:
                metrics[name] = percent(row[f"{field}_accuracy"] for row in answered)
                by_kind = mean_by(answered, f"{field}_accuracy", "kind")
                metrics |= {f"{name}/{kind}": value for kind, value in by_kind.items()}
        metrics |= self._chance(rows)
        if {"vqa_blind", "vqa_oracle"} <= set(metrics) and metrics["vqa_oracle"] > metrics["vqa_blind"]:
            gained, possible = (metrics[name] - metrics["vqa_blind"] for name in ("vqa_accuracy", "vqa_oracle"))
            metrics["bridging_efficiency"] = gained / possible
        return metrics

    def _chance(self, rows: list[Prediction]) -> dict[str, float]:
        by_kind: dict[str, list[Prediction]] = {}
        for row in rows:
            by_kind.setdefault(row["kind"], []).append(row)
        constant = {kind: self._constant_answer(members) for kind, members in by_kind.items()}
        metrics = {"chance": percent(self._constant_answer(rows))}
        metrics["chance_by_kind"] = percent(value for values in constant.values() for value in values)
        return metrics | {f"chance/{kind}": percent(values) for kind, values in sorted(constant.items()) if kind}

    def _constant_answer(self, rows: Sequence[Prediction]) -> list[float]:
        """Accuracies of always giving the answer that most questions have."""
        counts: Counter[str] = Counter(Counter(row["answers"]).most_common(1)[0][0] for row in rows)
        answer = min(counts, key=lambda text: (-counts[text], text))
        return [self._accuracy(answer, row["answers"]) for row in rows]


_FIELDS = {
    "prediction": "vqa_accuracy",
    "blind": "vqa_blind",
    "shuffled": "vqa_shuffled",
    "oracle": "vqa_oracle",
}


def _row(item: EvalItem, row: int, question: Question) -> Prediction:
    return {
        "item": row,
        "key": item.key,
        "image_id": item.image_id,
        "question_id": question.question_id,
        "kind": question.kind,
        "question": question.question,
        "answers": list(question.answers),
    }


def _merge(local: list[Prediction], name: str) -> list[Prediction]:
    """All ranks' rows in record order, every question of an image once."""
    rows: dict[tuple[int, str], Prediction] = {}
    for row in sorted(gather_objects(local), key=lambda entry: entry["position"]):
        rows.setdefault((row["image_id"], row["question_id"]), row)
        del row["position"]
    if not rows:
        raise DataError(
            "no question to answer",
            where=f"benchmark {name}",
            fix='give shards whose records have "questions" (with answers) in their JSON',
        )
    for row in rows.values():
        if not row["answers"]:
            raise DataError(
                f"question {row['question_id']} has no answers",
                where=f"benchmark {name}, record {row['key']}",
                fix="leave it out, or use a split whose answers are public",
            )
    return list(rows.values())


def _choose_shown(rows: list[Prediction], budget: int) -> set[str]:
    """Mark rows of up to `budget` images for the report: right and wrong in turn, kinds as evenly as they come."""
    right = _round_robin([row for row in rows if row["prediction_accuracy"] >= 0.5])
    wrong = _round_robin([row for row in rows if row["prediction_accuracy"] < 0.5])
    matched = min(len(right), len(wrong))
    by_turns = [row for pair in zip(right, wrong, strict=False) for row in pair] + right[matched:] + wrong[matched:]
    keys: set[str] = set()
    for row in by_turns:
        if len(keys | {row["key"]}) <= budget and row["key"] not in keys:
            keys.add(row["key"])
            row["shown"] = True
    return keys


def _round_robin(rows: list[Prediction]) -> list[Prediction]:
    """Rows re-ordered so that their kinds alternate; stable within a kind."""
    seen: Counter[str] = Counter()
    turns: list[tuple[int, Prediction]] = []
    for row in rows:
        turns.append((seen[row["kind"]], row))
        seen[row["kind"]] += 1
    return [row for _, row in sorted(turns, key=lambda entry: entry[0])]
