"""LM: aligned logits (B, T, V) and targets (B, T) -> loss of stage 2; the shared next-token loss of ITG.

Section 3.3 of the paper: language modelling for decoder-only, prefix language modelling for encoder-decoder models; the
adapters align logits and targets, so both are one loss. LAVIS takes each rank's own mean over tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from blip2train.batch import IGNORE_INDEX
from blip2train.model.autocast import full_precision
from blip2train.objective.context import ObjectiveOutput
from blip2train.objective.mean import mean_over
from blip2train.objective.setting import check_label_smoothing

if TYPE_CHECKING:
    from blip2train.model.language_model.base import LanguageModelOutput


def next_token_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy summed over the counted tokens, in float32 or better.

    Args:
        logits: (B, T, V); position t predicts `targets[:, t]`, nothing is shifted here.
        targets: (B, T) token ids, `IGNORE_INDEX` where nothing is to be predicted.
        label_smoothing: share of the target spread over the whole vocabulary.

    Returns:
        Scalar. Zero, with a zero gradient, if no token counts.
    """
    return F.cross_entropy(
        full_precision(logits).flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
        reduction="sum",
    )


def count_tokens(targets: Tensor) -> Tensor:
    """How many tokens are to be predicted: a 0-dim int64."""
    return (targets != IGNORE_INDEX).sum()


def count_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """How many counted tokens' largest logit is the target; shapes as in `next_token_loss`."""
    return ((logits.detach().argmax(dim=-1) == targets) & (targets != IGNORE_INDEX)).sum()


class LanguageModelingObjective:
    """Loss of stage 2 for both kinds of language model.

    Args:
        label_smoothing: share of the target spread over the vocabulary (LAVIS: none).
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = check_label_smoothing(label_smoothing, "lm")

    def __call__(self, output: LanguageModelOutput, *, global_means: bool = True) -> ObjectiveOutput:
        """Loss and next-token accuracy over the target tokens: of all ranks, or of this one (see `mean_over`)."""
        mean = mean_over(count_tokens(output.targets), global_means=global_means)
        loss = mean(next_token_loss(output.logits, output.targets, self.label_smoothing))
        return ObjectiveOutput(loss, {"lm_token_accuracy": mean(count_correct(output.logits, output.targets))})
