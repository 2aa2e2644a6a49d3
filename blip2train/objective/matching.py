"""ITM: 3B image-text pairs, one third of them true -> two-class loss.

Section 3.2 of the paper, Image-Text Matching, with hard negatives as in ALBEF (arXiv 2107.07651). LAVIS draws them in a
Python loop with 2B device syncs and overwrites the similarities it draws from; a row without any allowed negative
(batch of one, or one image only) takes its own pair as negative or crashes. Here such rows are left out and counted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2train.batch import IGNORE_INDEX
from blip2train.model.autocast import full_precision
from blip2train.objective.context import ObjectiveOutput, Stage1Context
from blip2train.objective.setting import check_share, check_weight

_FINITE = 1e30
"""Stands for infinite logits, and its negative for NaN: far beyond any similarity, yet safe to add to."""

NO_NEGATIVE = -1
"""Column of a row in which nothing may be drawn."""


def sample_hard_negatives(similarity: Tensor, forbidden: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one column per row, with probability softmax(similarity) over the allowed columns.

    Adds Gumbel noise and takes the best, which is that very distribution. `torch.multinomial` wants probabilities: they
    underflow to 0, an all-zero row aborts, and checking for one makes the host wait for the device.

    Args:
        similarity: (B, G) contrastive logits; neither written to nor given a gradient. NaN counts as least likely, so
            that a diverged step shows in the loss instead of crashing here.
        forbidden: (B, G) bool, True where the pair is not a negative.
        generator: on the device of `similarity`.

    Returns:
        (B,) int64; `NO_NEGATIVE` where everything is forbidden.
    """
    logits_BG = full_precision(similarity.detach()).nan_to_num(nan=-_FINITE, posinf=_FINITE, neginf=-_FINITE)
    gumbel_BG = -torch.empty_like(logits_BG).exponential_(generator=generator).log()
    drawn_B = (logits_BG + gumbel_BG).masked_fill(forbidden, -torch.inf).argmax(dim=1)
    return torch.where(forbidden.all(dim=1), NO_NEGATIVE, drawn_B)


class MatchingObjective:
    """Image-text matching loss over positives, (negative image, text) and (image, negative text).

    Args:
        weight: factor of this loss in the sum.
        hard_share: chance of each negative to be drawn by contrastive similarity, as in the paper (1.0); the others are
            drawn evenly. Below 1 the loss leaves its plateau (always "no match") sooner: easy pairs teach it. At 0
            no contrastive pass is needed.
        same_text_matches: True: a pair with the same text is no negative either, as it is none with the same image.
            Worth it where captions repeat, as in synthetic data; LAVIS knows neither.
        same_image_matches: True: a pair with the same image is no negative. False: only the own pair is excluded, as in
            LAVIS's pre-training, which knows no image ids: another caption of the image may be its negative.
    """

    def __init__(
        self,
        weight: float = 1.0,
        hard_share: float = 1.0,
        same_text_matches: bool = False,
        same_image_matches: bool = True,
    ) -> None:
        self.weight = check_weight(weight, "itm")
        self.hard_share = check_share(hard_share, "stage.objectives.itm.hard_share")
        self.same_text_matches = same_text_matches
        self.same_image_matches = same_image_matches

    def __call__(self, context: Stage1Context) -> ObjectiveOutput:
        """Loss over the pairs that exist, and the share of them classified right (chance: 2/3)."""
        negative_image_B, negative_text_B = self._negatives(context)
        logits_R2 = full_precision(_pair_logits(context, negative_image_B, negative_text_B))
        labels_R = matching_labels(negative_image_B, negative_text_B)
        counted_R = labels_R != IGNORE_INDEX
        correct_R = (logits_R2.detach().argmax(dim=1) == labels_R) & counted_R
        metrics = {
            "itm_accuracy": correct_R.sum() / counted_R.sum(),
            "itm_missing_negatives": 1.0 - (counted_R.sum() - len(negative_image_B)) / (2.0 * len(negative_image_B)),
        }
        return ObjectiveOutput(F.cross_entropy(logits_R2, labels_R, ignore_index=IGNORE_INDEX), metrics)

    def _negatives(self, context: Stage1Context) -> tuple[Tensor, Tensor]:
        forbidden_BG = context.same_image if self.same_image_matches else context.own_pair
        if self.same_text_matches:
            forbidden_BG = forbidden_BG | context.same_text
        evenly_BG = torch.zeros(forbidden_BG.shape, device=forbidden_BG.device)
        if not self.hard_share:
            return (
                sample_hard_negatives(evenly_BG, forbidden_BG, context.generator),
                sample_hard_negatives(evenly_BG, forbidden_BG, context.generator),
            )
        return (
            sample_hard_negatives(self._soften(context.similarity_t2i, context), forbidden_BG, context.generator),
            sample_hard_negatives(self._soften(context.similarity_i2t, context), forbidden_BG, context.generator),
        )

    def _soften(self, similarity_BG: Tensor, context: Stage1Context) -> Tensor:
        """Similarities with the rows of easy draws flattened to zero."""
        if self.hard_share == 1.0:
            return similarity_BG
        device = similarity_BG.device
        hard_B = torch.rand(len(similarity_BG), device=device, generator=context.generator) < self.hard_share
        return torch.where(hard_B[:, None], similarity_BG, 0.0)


def matching_labels(negative_image: Tensor, negative_text: Tensor) -> Tensor:
    """(3B,) labels in the order of the pairs: B ones, then zeros; pairs whose negative is missing are ignored."""
    positive_B = torch.ones_like(negative_image)
    drawn_N = torch.cat([negative_image, negative_text])
    return torch.cat([positive_B, torch.where(drawn_N == NO_NEGATIVE, IGNORE_INDEX, 0)])


def _pair_logits(context: Stage1Context, negative_image_B: Tensor, negative_text_B: Tensor) -> Tensor:
    """(3B, 2) in one pass; a missing negative keeps its row (index 0), so that no shape depends on the data."""
    images, rows_2B = context.images_and_negatives(negative_image_B.clamp(min=0))
    image_rows_R = torch.cat([rows_2B, rows_2B[: len(negative_image_B)]])
    ids_GT, mask_GT = context.gathered_text
    text_rows_R = torch.cat([context.own_column, context.own_column, negative_text_B.clamp(min=0)])
    return context.model.matching_logits(images, ids_GT[text_rows_R], mask_GT[text_rows_R], image_rows_R)
