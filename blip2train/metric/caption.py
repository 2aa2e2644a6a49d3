"""Captions and references -> CIDEr, BLEU, ROUGE-L; the only door to pycocoevalcap.

The COCO caption protocol behind the paper's Table 3. The scorers are pycocoevalcap's; its tokenizer is a Java program
and is replaced by ours, so no number here needs Java (METEOR and SPICE do, and are left out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from blip2train.errors import DataError
from blip2train.metric.ptb_tokenizer import caption_words

BLEU_ORDER = 4


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Scores on coco-caption's scale: a CIDEr of 1.0 is what papers print as 100, a BLEU of 0.4 as 40.

    Args:
        overall: "bleu_1" to "bleu_4", "rouge_l" and "cider". BLEU is the corpus score, not the mean over images.
        per_image: the same keys for every image, in the order given.
    """

    overall: Mapping[str, float]
    per_image: tuple[Mapping[str, float], ...]

    @property
    def cider_per_image(self) -> tuple[float, ...]:
        return tuple(scores["cider"] for scores in self.per_image)


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Score one caption per image against all its references; an empty caption is allowed and scores 0.

    CIDEr weighs words by how many of *these* images mention them: scores of different image sets do not compare, and a
    single image always has a CIDEr of 0.

    Args:
        candidates: raw captions, tokenized here.
        references: at least one raw reference for each.

    Raises:
        DataError: the lengths differ, there is no caption, or an image has no reference.
    """
    _check(candidates, references)
    given = {index: [" ".join(caption_words(text))] for index, text in enumerate(candidates)}
    truth = {index: [" ".join(caption_words(text)) for text in texts] for index, texts in enumerate(references)}
    bleu, bleu_per_image = Bleu(BLEU_ORDER).compute_score(truth, given, verbose=0)
    rouge, rouge_per_image = Rouge().compute_score(truth, given)
    cider, cider_per_image = Cider().compute_score(truth, given)
    names = (*(f"bleu_{order + 1}" for order in range(BLEU_ORDER)), "rouge_l", "cider")
    columns = (*bleu_per_image, rouge_per_image, cider_per_image)
    return CaptionScores(
        overall=dict(zip(names, map(float, (*bleu, rouge, cider)), strict=True)),
        per_image=tuple(dict(zip(names, map(float, values), strict=True)) for values in zip(*columns, strict=True)),
    )


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(candidates) != len(references) or not candidates:
        raise DataError(
            f"{len(candidates)} captions for {len(references)} images",
            where="caption scores",
            fix="give one caption and a list of references per image",
        )
    bare = [index for index, texts in enumerate(references) if not texts]
    if bare:
        raise DataError(
            f"{len(bare)} images have no reference, the first is number {bare[0]}",
            where="caption scores",
            fix="leave them out before scoring",
        )
