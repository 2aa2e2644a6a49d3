"""ITG: the caption, generated from the queries' keys and values -> loss.

Section 3.2 of the paper, Image-grounded Text Generation: [DEC] replaces [CLS], text sees all queries and earlier text.
Label smoothing 0.1 and the mean over this rank's tokens are LAVIS's; pads are found by the mask, not by their id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip2train.batch import IGNORE_INDEX
from blip2train.objective.context import ObjectiveOutput, Stage1Context
from blip2train.objective.language_modeling import next_token_loss, token_accuracy
from blip2train.objective.setting import check_label_smoothing, check_weight


class GroundedGenerationObjective:
    """Captioning loss through the Q-Former's own language-model head.

    Args:
        dec_id: id of [DEC], the token that starts a generated text.
        weight: factor of this loss in the sum.
        label_smoothing: share of the target spread over the vocabulary (LAVIS: 0.1; the paper is silent).
    """

    def __init__(self, dec_id: int, weight: float = 1.0, label_smoothing: float = 0.1) -> None:
        self.dec_id = dec_id
        self.weight = check_weight(weight, "itg")
        self.label_smoothing = check_label_smoothing(label_smoothing, "itg")

    def __call__(self, context: Stage1Context) -> ObjectiveOutput:
        """Loss and next-token accuracy; a batch of empty texts still predicts [SEP]."""
        ids_BT, mask_BT, targets_BT = generation_inputs(
            context.batch.input_ids, context.batch.attention_mask, self.dec_id
        )
        logits_BTV = context.model.generation_logits(ids_BT, mask_BT, context.query)
        loss = next_token_loss(logits_BTV, targets_BT, self.label_smoothing)
        return ObjectiveOutput(loss, {"itg_token_accuracy": token_accuracy(logits_BTV, targets_BT)})


def generation_inputs(input_ids: Tensor, attention_mask: Tensor, dec_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shift a text against itself: position t of the inputs predicts token t + 1.

    Args:
        input_ids: (B, T), starting with [CLS].
        attention_mask: (B, T) bool.
        dec_id: takes the place of [CLS].

    Returns:
        Input ids and mask without the last position, which predicts nothing, and targets: each (B, T - 1). A one-token
        text keeps its position, with nothing to predict.
    """
    length = max(input_ids.shape[1] - 1, 1)
    start_B1 = torch.full_like(input_ids[:, :1], dec_id)
    nothing_B1 = torch.full_like(start_B1, IGNORE_INDEX)
    ids_BT = torch.cat([start_B1, input_ids[:, 1:]], dim=1)
    targets_BT = torch.cat([input_ids[:, 1:].masked_fill(~attention_mask[:, 1:], IGNORE_INDEX), nothing_B1], dim=1)
    return ids_BT[:, :length], attention_mask[:, :length], targets_BT[:, :length]
