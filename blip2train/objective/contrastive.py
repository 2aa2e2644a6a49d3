"""ITC: similarities (B, G) in both directions -> loss.

Section 3.2 of the paper, Image-Text Contrastive Learning; smoothing 0.1 and the learned temperature are LAVIS's.
Differs from LAVIS pre-training in one default: several captions of one image in a batch share the target.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from blip2train.objective.context import ObjectiveOutput, Stage1Context
from blip2train.objective.setting import check_label_smoothing, check_weight
from blip2train.objective.similarity import query_likeness


def contrastive_loss(logits: Tensor, positive: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy against the uniform distribution over each row's positives.

    Args:
        logits: (B, G), already divided by the temperature.
        positive: (B, G) bool, at least one True per row. With exactly one it is the usual InfoNCE.
        label_smoothing: share of the target that is spread evenly over all G columns.

    Returns:
        Scalar, mean over rows.
    """
    share_BG = positive.to(logits.dtype) / positive.sum(dim=1, keepdim=True)
    target_BG = (1.0 - label_smoothing) * share_BG + label_smoothing / logits.shape[1]
    return -(target_BG * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


class ContrastiveObjective:
    """Image-text contrastive loss, mean of both directions.

    Args:
        weight: factor of this loss in the sum.
        label_smoothing: share of the target spread over the whole batch (LAVIS: 0.1; the paper is silent).
        multi_positive: True: every pair with the row's image id is a positive, so two captions of one image are not
            pushed apart; LAVIS does this in retrieval fine-tuning. When all ids differ, as in web-scale pre-training,
            it is exactly the one-hot loss. False: only the own column counts (LAVIS pre-training, which knows no ids).
            Repeated texts need no such care: equal columns share the softmax whatever the target says.
    """

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.1, multi_positive: bool = True) -> None:
        self.weight = check_weight(weight, "itc")
        self.label_smoothing = check_label_smoothing(label_smoothing, "itc")
        self.multi_positive = multi_positive

    def __call__(self, context: Stage1Context) -> ObjectiveOutput:
        """Loss and the share of rows whose best column is a positive (chance: 1/G when all images differ)."""
        image_to_text_BG, text_to_image_BG = context.similarity_i2t, context.similarity_t2i
        positive_BG = context.same_image if self.multi_positive else context.own_pair
        loss = (0.5 * context.row_share) * (
            contrastive_loss(image_to_text_BG, positive_BG, self.label_smoothing)
            + contrastive_loss(text_to_image_BG, positive_BG, self.label_smoothing)
        )
        metrics = {
            "itc_i2t_accuracy": context.row_share * _accuracy(image_to_text_BG, positive_BG),
            "itc_t2i_accuracy": context.row_share * _accuracy(text_to_image_BG, positive_BG),
            "itc_query_similarity": context.row_share * query_likeness(context.image_features),
            "temperature": context.model.temperature.detach().reshape(()).clone(),
        }
        return ObjectiveOutput(loss, metrics)


def _accuracy(logits_BG: Tensor, positive_BG: Tensor) -> Tensor:
    best_B1 = logits_BG.detach().argmax(dim=1, keepdim=True)
    return positive_BG.gather(1, best_B1).to(logits_BG.dtype).mean()
