"""LM: aligned logits (B, T, V) and targets (B, T) -> loss of stage 2; the shared next-token loss of ITG.

Section 3.3 of the paper: language modelling for decoder-only, prefix language modelling for encoder-decoder models; the
adapters align logits and targets, so both are one loss. Mean over this rank's tokens, as in LAVIS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from blip2train.batch import IGNORE_INDEX
from blip2train.model.autocast import full_precision
from blip2train.objective.context import ObjectiveOutput
from blip2train.objective.setting import check_label_smoothing

if TYPE_CHECKING:
    from blip2train.model.language_model.base import LanguageModelOutput


def next_token_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy per counted token, in float32 or better.

    Args:
        logits: (B, T, V); position t predicts `targets[:, t]`, nothing is shifted here.
        targets: (B, T) token ids, `IGNORE_INDEX` where nothing is to be predicted.
        label_smoothing: share of the target spread over the whole vocabulary.

    Returns:
        Scalar: the mean over this rank's counted tokens, so ranks with short texts weigh each token more. Zero, with a
        zero gradient, if no token counts.
    """
    loss_sum = F.cross_entropy(
        full_precision(logits).flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return loss_sum / (targets != IGNORE_INDEX).sum().clamp(min=1)


def token_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of the counted tokens whose largest logit is the target; shapes as in `next_token_loss`."""
    counted_BT = targets != IGNORE_INDEX
    correct_BT = (logits.detach().argmax(dim=-1) == targets) & counted_BT
    return correct_BT.sum() / counted_BT.sum().clamp(min=1)


class LanguageModelingObjective:
    """Loss of stage 2 for both kinds of language model.

    Args:
        label_smoothing: share of the target spread over the vocabulary (LAVIS: none).
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = check_label_smoothing(label_smoothing, "lm")

    def __call__(self, output: LanguageModelOutput) -> ObjectiveOutput:
        """Loss and next-token accuracy over this rank's target tokens."""
        loss = next_token_loss(output.logits, output.targets, self.label_smoothing)
        return ObjectiveOutput(loss, {"lm_token_accuracy": token_accuracy(output.logits, output.targets)})
