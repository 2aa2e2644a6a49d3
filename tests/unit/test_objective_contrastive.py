import math

import pytest
import torch
from fake_stage1 import fake_batch, fake_model

from blip2train.objective.context import build_context
from blip2train.objective.contrastive import ContrastiveObjective, contrastive_loss


def _naive_loss(logits: torch.Tensor, positives: list[set[int]], smoothing: float) -> float:
    """Cross-entropy by its definition, one number at a time."""
    rows = []
    for row, positive in zip(logits.tolist(), positives, strict=True):
        log_total = math.log(sum(math.exp(value) for value in row))
        targets = [
            (1 - smoothing) * (column in positive) / len(positive) + smoothing / len(row) for column in range(len(row))
        ]
        rows.append(-sum(target * (value - log_total) for target, value in zip(targets, row, strict=True)))
    return sum(rows) / len(rows)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("positives", [[{0}, {1}, {2}], [{0, 3}, {1}, {0, 2, 3}]])
def test_loss_equals_the_naive_loop(smoothing: float, positives: list[set[int]]) -> None:
    logits_BG = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    mask_BG = torch.tensor([[column in row for column in range(4)] for row in positives])
    loss = contrastive_loss(logits_BG, mask_BG, smoothing)
    assert abs(float(loss) - _naive_loss(logits_BG, positives, smoothing)) < 1e-12


def test_one_positive_per_row_is_torchs_cross_entropy_with_smoothing() -> None:
    logits_BG = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(logits_BG, torch.arange(5), label_smoothing=0.1)
    torch.testing.assert_close(contrastive_loss(logits_BG, torch.eye(5, 8, dtype=torch.bool), 0.1), expected)


def _naive_objective(multi_positive: bool, image_ids: list[int]) -> float:
    model, batch = fake_model(), fake_batch(len(image_ids), image_ids=image_ids)
    with torch.no_grad():
        image_BQE = model.image_features(model.encode_image(model.image_tokens(batch.pixel_values)).hidden)
        text_BE = model.text_features(batch.input_ids, batch.attention_mask)
        logits_BB = torch.stack(
            [torch.stack([max(image @ text for image in images) for text in text_BE]) for images in image_BQE]
        ) / float(model.temperature)
    rows = range(len(image_ids))
    positives = [{j for j in rows if (image_ids[i] == image_ids[j] if multi_positive else i == j)} for i in rows]
    return (_naive_loss(logits_BB, positives, 0.1) + _naive_loss(logits_BB.T, positives, 0.1)) / 2


@pytest.mark.parametrize("multi_positive", [True, False])
@pytest.mark.parametrize("image_ids", [[1, 2, 3, 4], [7, 8, 7, 7]])
def test_objective_equals_the_naive_loop_in_both_directions(multi_positive: bool, image_ids: list[int]) -> None:
    context = build_context(fake_model(), fake_batch(4, image_ids=image_ids), gather_gradients=True)
    output = ContrastiveObjective(multi_positive=multi_positive)(context)
    assert abs(float(output.loss) - _naive_objective(multi_positive, image_ids)) < 1e-10


def test_captions_of_one_image_share_the_target_only_when_asked_to() -> None:
    assert _naive_objective(True, [1, 2, 3, 4]) == _naive_objective(False, [1, 2, 3, 4])
    assert _naive_objective(True, [7, 8, 7, 7]) != _naive_objective(False, [7, 8, 7, 7])


def test_accuracy_counts_any_caption_of_the_image() -> None:
    def accuracy(multi_positive: bool) -> float:
        context = build_context(fake_model(), fake_batch(2, image_ids=[5, 5]), gather_gradients=True)
        context.similarity_i2t = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        output = ContrastiveObjective(multi_positive=multi_positive)(context)
        return float(output.metrics["itc_i2t_accuracy"])

    assert accuracy(True) == 1.0
    assert accuracy(False) == 0.5


def test_batch_of_one_has_no_loss_and_finite_gradients() -> None:
    model = fake_model()
    output = ContrastiveObjective()(build_context(model, fake_batch(1), gather_gradients=True))
    output.loss.backward()
    assert abs(float(output.loss)) < 1e-12
    assert all(torch.isfinite(item.grad).all() for item in model.parameters() if item.grad is not None)


def test_temperature_is_learned() -> None:
    model = fake_model()
    ContrastiveObjective()(build_context(model, fake_batch(4), gather_gradients=False)).loss.backward()
    assert float(model.temperature.grad.abs()) > 0


def test_sharing_the_target_between_repeated_texts_would_change_nothing() -> None:
    """Why there is no such option: equal columns have equal probabilities, and the rows that own them are averaged."""
    batch = fake_batch(3)
    batch.input_ids[2], batch.attention_mask[2] = batch.input_ids[0], batch.attention_mask[0]
    context = build_context(fake_model(), batch, gather_gradients=True)
    assert context.same_text.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    shared = sum(
        _naive_loss(logits.detach(), [{0, 2}, {1}, {0, 2}], 0.1)
        for logits in (context.similarity_i2t, context.similarity_t2i)
    )
    assert float(ContrastiveObjective()(context).loss) == pytest.approx(shared / 2, abs=1e-12)
