"""Predicted answers and human answers -> VQA accuracy.

The VQA challenge's rule (Antol et al. 2015, evaluator of 2021): min(1, matches / 3) averaged over leaving out each
annotator. LAVIS cleans predictions always and human answers almost never; both variants are here, the official one is
the default and the one the paper's numbers need.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from blip2train.errors import ConfigError, DataError

Variant = Literal["official", "lavis"]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The published pattern reads (?!<=\d)(\.)(?!\d): its first group, a mistyped look-behind, can never reject a period.
_PERIOD = re.compile(r"\.(?!\d)")
# The official script passes re.UNICODE (32) where `re.sub` expects the largest number of replacements.
_MAX_PERIODS = 32

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _apostrophe_lost() -> dict[str, str]:
    """Every spelling that misses exactly one apostrophe, and the one entry of the official table that adds none."""
    table = {"somebody'd": "somebodyd"}
    for word in _CONTRACTIONS.split():
        for at in (found.start() for found in re.finditer("'", word)):
            table[word[:at] + word[at + 1 :]] = word
    return table


_SPELLING = _apostrophe_lost()


def strip_punctuation(answer: str) -> str:
    """Drop each mark that touches a space (or every mark, beside a number like 1,000), else put a space for it.

    Periods go unless a digit follows; apostrophes, colons, case and inner spaces stay.
    """
    dropping = _COMMA_IN_NUMBER.search(answer) is not None
    cleaned = answer
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in answer or f" {mark}" in answer
        cleaned = cleaned.replace(mark, "" if dropping or touches_space else " ")
    return _PERIOD.sub("", cleaned, count=_MAX_PERIODS)


def normalize_words(answer: str) -> str:
    """Lower-case, number words up to ten as digits, no articles, lost apostrophes restored, single spaces."""
    words = [_DIGITS.get(word, word) for word in answer.lower().split()]
    return " ".join(_SPELLING.get(word, word) for word in words if word not in _ARTICLES)


def normalize_answer(answer: str) -> str:
    """The full cleaning of the official evaluator, white space included."""
    return normalize_words(strip_punctuation(_flatten(answer)))


def answer_accuracy(prediction: str, answers: Sequence[str], variant: Variant = "official") -> float:
    """Accuracy of one prediction, in [0, 1].

    Args:
        prediction: free text.
        answers: of the human annotators, usually ten. With a single one, which leaves no other annotator to agree with,
            the score is whether the two match.
        variant: "official" cleans both sides, but neither if all annotators agree to the letter; "lavis" cleans the
            prediction always and of the human answers only the punctuation, where they differ.

    Raises:
        ConfigError: unknown variant.
        DataError: there is no human answer.
    """
    if variant not in ("official", "lavis"):
        raise ConfigError(f"variant is {variant!r}", where="vqa accuracy", fix='"official" or "lavis"')
    if not answers:
        raise DataError("a question has no answers", where="vqa accuracy", fix="leave the question out")
    given, truths = _compared(prediction, answers, variant)
    matches = [truth == given for truth in truths]
    if len(matches) == 1:
        return float(matches[0])
    return sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(matches)


@dataclass(frozen=True, slots=True)
class VqaScore:
    """Accuracies in percent: all questions, by kind, and each question in the order given."""

    overall: float
    per_kind: Mapping[str, float]
    per_question: tuple[float, ...]


def vqa_accuracy(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    kinds: Sequence[str] | None = None,
    variant: Variant = "official",
) -> VqaScore:
    """Mean accuracy over questions; the evaluators round theirs to two places, this is not rounded.

    Args:
        predictions: one per question.
        answers: the human answers of each question.
        kinds: a label per question to group by (answer type, question type); none gives no groups.
        variant: see `answer_accuracy`.

    Raises:
        DataError: the lengths differ, or there is no question.
    """
    sizes = {len(predictions), len(answers), len(predictions if kinds is None else kinds)}
    if len(sizes) != 1 or not predictions:
        raise DataError(
            f"{len(predictions)} predictions for {len(answers)} questions",
            where="vqa accuracy",
            fix="answer every question once",
        )
    scores = [
        100.0 * answer_accuracy(prediction, truth, variant)
        for prediction, truth in zip(predictions, answers, strict=True)
    ]
    by_kind: dict[str, list[float]] = {}
    for kind, score in zip(kinds or (), scores, strict=False):
        by_kind.setdefault(kind, []).append(score)
    per_kind = {kind: sum(values) / len(values) for kind, values in by_kind.items()}
    return VqaScore(sum(scores) / len(scores), per_kind, tuple(scores))


def exact_match_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Percent of predictions equal to one of the answers after the full cleaning of both (GQA's rule)."""
    if len(predictions) != len(answers) or not predictions:
        raise DataError(
            f"{len(predictions)} predictions for {len(answers)} questions",
            where="exact match",
            fix="answer every question once",
        )
    hits = [
        normalize_answer(prediction) in {normalize_answer(answer) for answer in truth}
        for prediction, truth in zip(predictions, answers, strict=True)
    ]
    return 100.0 * sum(hits) / len(hits)


def _flatten(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _compared(prediction: str, answers: Sequence[str], variant: Variant) -> tuple[str, list[str]]:
    if variant == "lavis":
        agreed = len(set(answers)) == 1
        return normalize_answer(prediction), [item if agreed else strip_punctuation(item) for item in answers]
    flat = [_flatten(answer) for answer in answers]
    if len(set(flat)) == 1:
        return _flatten(prediction), flat
    return normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
