import math

import torch
from fake_stage1 import DEC_ID, VOCAB, fake_batch, fake_model

from blip2train.batch import IGNORE_INDEX
from blip2train.objective.context import build_context
from blip2train.objective.grounded_generation import GroundedGenerationObjective, generation_inputs


def test_dec_replaces_cls_targets_shift_by_one_and_pads_are_ignored() -> None:
    ids_BT = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    mask_BT = torch.tensor([[True] * 4, [True, True, True, False]])
    decoder_ids, decoder_mask, targets = generation_inputs(ids_BT, mask_BT, dec_id=DEC_ID)
    assert decoder_ids.tolist() == [[DEC_ID, 5, 6], [DEC_ID, 7, 3]]
    assert decoder_mask.all()
    assert targets.tolist() == [[5, 6, 3], [7, 3, IGNORE_INDEX]]
    assert ids_BT[0, 0] == 2, "the batch keeps its [CLS]"


def test_a_real_token_whose_id_is_the_pads_still_counts() -> None:
    _, _, targets = generation_inputs(torch.tensor([[2, 0, 3]]), torch.tensor([[True, True, True]]), dec_id=DEC_ID)
    assert targets.tolist() == [[0, 3]]


def test_objective_equals_a_naive_loop_over_valid_tokens() -> None:
    model, batch = fake_model(), fake_batch(4)
    output = GroundedGenerationObjective(dec_id=DEC_ID)(build_context(model, batch, gather_gradients=True))
    losses, hits = [], []
    with torch.no_grad():
        query = model.encode_image(model.image_tokens(batch.pixel_values))
        ids_BT = batch.input_ids.clone()
        ids_BT[:, 0] = DEC_ID
        logits_BTV = model.generation_logits(ids_BT, batch.attention_mask, query).tolist()
    for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
        for position in range(length - 1):
            logits, target = logits_BTV[row][position], int(batch.input_ids[row, position + 1])
            log_total = math.log(sum(math.exp(value) for value in logits))
            losses.append(
                -sum((0.9 * (token == target) + 0.1 / VOCAB) * (logits[token] - log_total) for token in range(VOCAB))
            )
            hits.append(max(range(VOCAB), key=logits.__getitem__) == target)
    assert abs(float(output.loss) - sum(losses) / len(losses)) < 1e-12
    assert abs(float(output.metrics["itg_token_accuracy"]) - sum(hits) / len(hits)) < 1e-6


def test_more_padding_changes_nothing() -> None:
    short = fake_batch(4)
    longer = fake_batch(4)
    longer.input_ids = torch.nn.functional.pad(short.input_ids, (0, 3))
    longer.attention_mask = torch.nn.functional.pad(short.attention_mask, (0, 3))
    losses = [
        GroundedGenerationObjective(dec_id=DEC_ID)(build_context(fake_model(), batch, gather_gradients=True)).loss
        for batch in (short, longer)
    ]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-14)


def test_batch_of_one_runs_and_a_text_of_one_token_gives_zero() -> None:
    model, batch = fake_model(), fake_batch(1)
    assert float(GroundedGenerationObjective(dec_id=DEC_ID)(build_context(model, batch)).loss) > 0
    batch.input_ids, batch.attention_mask = batch.input_ids[:, :1], batch.attention_mask[:, :1]
    loss = GroundedGenerationObjective(dec_id=DEC_ID)(build_context(model, batch)).loss
    loss.backward()
    assert float(loss) == 0.0
