"""ITM: 3B image-text pairs, one third of them true -> two-class loss.

Section 3.2 of the paper, Image-Text Matching, with hard negatives as in ALBEF (arXiv 2107.07651). LAVIS draws them in a
Python loop with 2B device syncs and overwrites the similarities it draws from; a row without any allowed negative
(batch of one, or one image only) takes its own pair as negative or crashes. Here such rows are left out and counted.
The draws depend on seed, step and the pairs themselves: N ranks draw what one would, whoever has which pair.
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

_IMAGE, _TEXT, _IS_HARD = 0, 1, 2
"""Streams of random numbers: which image, which text; 2 and 3: whether that image, that text is drawn by similarity."""


def sample_hard_negatives(similarity: Tensor, forbidden: Tensor, gumbel: Tensor) -> Tensor:
    """Draw one column per row, with probability softmax(similarity) over the allowed columns.

    Adds Gumbel noise and takes the best, which is that very distribution. `torch.multinomial` wants probabilities: they
    underflow to 0, an all-zero row aborts, and checking for one makes the host wait for the device.

    Args:
        similarity: (B, G) contrastive logits; neither written to nor given a gradient. NaN counts as least likely, so
            that a diverged step shows in the loss instead of crashing here.
        forbidden: (B, G) bool, True where the pair is not a negative.
        gumbel: (B, G) independent standard Gumbel noise (`Draw.gumbel`).

    Returns:
        (B,) int64; `NO_NEGATIVE` where everything is forbidden.
    """
    logits_BG = full_precision(similarity.detach()).nan_to_num(nan=-_FINITE, posinf=_FINITE, neginf=-_FINITE)
    drawn_B = (logits_BG + gumbel).masked_fill(forbidden, -torch.inf).argmax(dim=1)
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
        mean = context.mean_over(counted_R.sum())
        missing = (~counted_R).sum() / (2.0 * len(negative_image_B))
        metrics = {
            "itm_accuracy": mean(correct_R.sum()),
            "itm_missing_negatives": context.row_share * missing,
        }
        loss_sum = F.cross_entropy(logits_R2, labels_R, ignore_index=IGNORE_INDEX, reduction="sum")
        return ObjectiveOutput(mean(loss_sum), metrics)

    def _negatives(self, context: Stage1Context) -> tuple[Tensor, Tensor]:
        forbidden_BG = context.same_image if self.same_image_matches else context.own_pair
        if self.same_text_matches:
            forbidden_BG = forbidden_BG | context.same_text
        return (
            sample_hard_negatives(self._logits(context, _IMAGE), forbidden_BG, _noise(context, _IMAGE)),
            sample_hard_negatives(self._logits(context, _TEXT), forbidden_BG, _noise(context, _TEXT)),
        )

    def _logits(self, context: Stage1Context, side: int) -> Tensor:
        """(B, G) what a row's negative of this side is drawn by: similarities, or zeros in rows of easy draws."""
        if not self.hard_share:
            return torch.zeros(context.own_pair.shape, device=context.own_pair.device)
        similarity_BG = context.similarity_t2i if side == _IMAGE else context.similarity_i2t
        if self.hard_share == 1.0:
            return similarity_BG
        own_B, _ = context.pair_ids
        hard_B = context.draw.uniform(side + _IS_HARD, own_B, torch.zeros_like(own_B)) < self.hard_share
        return torch.where(hard_B[:, None], similarity_BG, 0.0)


def _noise(context: Stage1Context, side: int) -> Tensor:
    own_B, all_G = context.pair_ids
    return context.draw.gumbel(side, own_B[:, None], all_G[None, :])


def matching_labels(negative_image: Tensor, negative_text: Tensor) -> Tensor:
    """(3B,) labels in the order of the pairs: B ones, then zeros; pairs whose negative is missing are ignored."""
    positive_B = torch.ones_like(negative_image)
    drawn_N = torch.cat([negative_image, negative_text])
    return torch.cat([positive_B, torch.where(drawn_N == NO_NEGATIVE, IGNORE_INDEX, 0)])


def _pair_logits(context: Stage1Context, negative_image_B: Tensor, negative_text_B: Tensor) -> Tensor:
    """(3B, 2) in one pass; a missing negative is the own one: no shape depends on the data, and nothing moves."""
    own_B = context.own_column
    fetched, image_rows_B = context.fetch_images(torch.where(negative_image_B == NO_NEGATIVE, own_B, negative_image_B))
    text_rows_B = torch.where(negative_text_B == NO_NEGATIVE, own_B, negative_text_B)
    ids_GT, mask_GT = context.gathered_text
    images = context.image

    def score(own_b: Tensor, other_image_b: Tensor, own_text_b: Tensor, other_text_b: Tensor) -> Tensor:
        texts = torch.cat([own_text_b, own_text_b, other_text_b])
        logits_r2 = context.model.matching_logits(
            images, ids_GT[texts], mask_GT[texts], torch.cat([own_b, other_image_b, own_b]), fetched
        )
        return logits_r2.view(3, len(own_b), 2).transpose(0, 1)

    logits_B32: Tensor = context.in_chunks(score, own_B - own_B[0], image_rows_B, own_B, text_rows_B)
    return logits_B32.transpose(0, 1).flatten(0, 1)
