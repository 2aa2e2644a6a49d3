"""Which numbers are scores, and which other numbers say how good they are.

A score without its baselines is unreadable: recall among 200 images, or accuracy on questions with three likely
answers. Every score therefore carries the reference points that its benchmark measured; nothing here is computed, only
arranged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blip2train.report.collect import Evaluation, Run

MEANING = {
    "chance": "a guess that looks at nothing",
    "prior": "always the most frequent answer to that kind of question",
    "blind": "the same model without any image",
    "shuffled": "the same model with another image",
    "re-ranked": "the same model after its matching head has re-ordered the best candidates",
    "oracle": "the frozen language model told the truth in words",
    "ceiling": "the best any model could reach on this set, whose captions are ambiguous",
}
"""Kinds of reference points, what each one is; from those a model should leave behind to those it may hope for."""


@dataclass(frozen=True, slots=True)
class Spec:
    """How a metric is shown.

    Args:
        metric: its name in metrics.json.
        label: its name for a reader.
        unit: "%", "CIDEr", "fraction" or "ratio".
        references: kind of reference point -> the metric that holds it.
        question: what the score answers, in plain words; only headline scores have one.
    """

    metric: str
    label: str
    unit: str
    references: Mapping[str, str]
    question: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """One number of one run with its reference points; `full` is the right end of its scale."""

    run: str
    benchmark: str
    task: str
    held_out: bool
    metric: str
    label: str
    unit: str
    value: float
    references: Mapping[str, float]
    full: float
    question: str

    @property
    def text(self) -> str:
        return format_number(self.value, self.unit)


_BY_KIND = {"chance": "chance", "blind": "vqa_blind", "shuffled": "vqa_shuffled", "oracle": "vqa_oracle"}
_ASKED = _BY_KIND | {"prior": "chance_by_kind"}
_RECALLS = tuple(
    Spec(
        f"{side}_recall@{k}{itm}",
        f"{label}, recall@{k}{suffix}",
        "%",
        ({"chance": "chance"} if k == 1 else {}) | ({} if itm else {"re-ranked": f"{side}_recall@{k}_itm"}),
        question if k == 1 and not itm else "",
    )
    for side, label, question in (
        ("text", "Image to text", "Given an image: is the text ranked first one of its own?"),
        ("image", "Text to image", "Given a text: is the image ranked first the one it describes?"),
    )
    for itm, suffix in (("", ""), ("_itm", " after re-ranking"))
    for k in (1, 5, 10)
)
SPECS: tuple[Spec, ...] = (
    *_RECALLS,
    Spec("vqa_accuracy", "Questions answered", "%", _ASKED, "Asked about an image: is the generated answer right?"),
    Spec(
        "caption_cider",
        "Captions, CIDEr",
        "CIDEr",
        {"blind": "caption_cider_blind", "shuffled": "caption_cider_shuffled"},
        "How close are generated captions to the references? 1.0 is what papers print as 100.",
    ),
    Spec(
        "caption_true",
        "Captions fully true",
        "%",
        {"shuffled": "caption_true_shuffled"},
        "Is every statement in the caption true of the image?",
    ),
    Spec("caption_bleu_4", "Captions, BLEU-4", "fraction", {"shuffled": "caption_bleu_4_shuffled"}),
    Spec("caption_rouge_l", "Captions, ROUGE-L", "fraction", {"shuffled": "caption_rouge_l_shuffled"}),
    Spec("bridging_efficiency", "Bridging efficiency", "ratio", {}),
)
"""In the order of the report. Add a line to show a new metric."""


def scores_of(run: Run) -> list[Score]:
    """All known scores of a run, in the order of `SPECS`, in-domain before held-out."""
    evaluations = sorted(run.evaluations, key=lambda found: (found.held_out, found.benchmark))
    found = [_score(run, evaluation, spec) for spec in SPECS for evaluation in evaluations]
    return [score for score in found if score is not None]


def scores_by_kind(run: Run, evaluation: Evaluation) -> list[Score]:
    """Accuracy of each kind of question of a VQA evaluation, empty for others."""
    prefix = "vqa_accuracy/"
    kinds = [key.removeprefix(prefix) for key in evaluation.metrics if key.startswith(prefix)]
    references = {kind: f"{metric}/{{}}" for kind, metric in _BY_KIND.items()}
    specs = [
        Spec(f"{prefix}{kind}", kind, "%", {name: metric.format(kind) for name, metric in references.items()})
        for kind in kinds
    ]
    found = [_score(run, evaluation, spec) for spec in specs]
    return [score for score in found if score is not None]


def format_number(value: float, unit: str) -> str:
    """The precision that the sizes of benchmarks justify: a tenth of a percent, a hundredth of CIDEr."""
    return f"{value:.1f} %" if unit == "%" else f"{value:.2f}"


def reference_kinds(scores: Sequence[Score]) -> list[str]:
    """The kinds of reference points that any of the scores has, in the order of `MEANING`."""
    return [kind for kind in MEANING if any(kind in score.references for score in scores)]


def held_out_pairs(scores: Sequence[Score]) -> list[tuple[Score, Score]]:
    """(in-domain, held-out) scores of the same metric, task and run."""
    held_out = {(score.run, score.task, score.metric): score for score in scores if score.held_out}
    inside = [score for score in scores if not score.held_out]
    keyed = [(score, held_out.get((score.run, score.task, score.metric))) for score in inside]
    return [(score, partner) for score, partner in keyed if partner is not None]


def _score(run: Run, evaluation: Evaluation, spec: Spec) -> Score | None:
    value = evaluation.metrics.get(spec.metric)
    if value is None:
        return None
    named = dict(spec.references) | {"ceiling": f"{spec.metric.removesuffix('_itm')}_ceiling"}
    references = {
        kind: evaluation.metrics[named[kind]] for kind in MEANING if kind in named and named[kind] in evaluation.metrics
    }
    fixed = {"%": 100.0, "ratio": 1.0}
    full = fixed.get(spec.unit, max(1.0, 1.1 * max([value, *references.values()])))
    return Score(
        run.name,
        evaluation.benchmark,
        evaluation.task,
        evaluation.held_out,
        spec.metric,
        spec.label,
        spec.unit,
        value,
        references,
        full,
        spec.question,
    )
