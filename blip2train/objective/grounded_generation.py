"""ITG: the caption, generated from the queries' keys and values -> loss.

Section 3.2 of the paper, Image-grounded Text Generation: [DEC] replaces [CLS], text sees all queries and earlier text.
Label smoothing 0.1 is LAVIS's. Its mean is over one rank's tokens, ours over all; pads are found by mask, not by id.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blip2train.batch import IGNORE_INDEX
from blip2train.objective.context import ObjectiveOutput, Stage1Context
from blip2train.objective.language_modeling import count_correct, count_tokens, next_token_loss
from blip2train.objective.setting import check_label_smoothing, check_weight

if TYPE_CHECKING:
    from blip2train.model.qformer.attention import KeysValues


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
        loss_C, correct_C = context.in_chunks(
            functools.partial(self._sums, context),
            *(context.query.hidden, context.query.keys_values, ids_BT, mask_BT, targets_BT),
        )
        mean = context.mean_over(count_tokens(targets_BT))
        return ObjectiveOutput(mean(loss_C.sum()), {"itg_token_accuracy": mean(correct_C.sum())})

    def _sums(
        self,
        context: Stage1Context,
        hidden_bQD: Tensor,
        keys_values: list[KeysValues],
        ids_bT: Tensor,
        mask_bT: Tensor,
        targets_bT: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Loss and number of correct tokens, (1,) each, so that no logits leave a micro-batch."""
        states = replace(context.query, hidden=hidden_bQD, keys_values=keys_values)
        logits_bTV = context.model.generation_logits(ids_bT, mask_bT, states)
        loss = next_token_loss(logits_bTV, targets_bT, self.label_smoothing)
        return loss[None], count_correct(logits_bTV, targets_bT)[None]


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
