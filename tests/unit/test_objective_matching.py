import math

import pytest
import torch
from fake_stage1 import fake_batch, fake_model

from blip2train.batch import IGNORE_INDEX
from blip2train.errors import ConfigError
from blip2train.objective import matching
from blip2train.objective.context import build_context
from blip2train.objective.draw import Draw
from blip2train.objective.matching import NO_NEGATIVE, MatchingObjective, matching_labels, sample_hard_negatives


def noise(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return Draw(seed, 0).gumbel(0, torch.arange(rows)[:, None], torch.arange(columns)[None, :])


def test_negatives_follow_the_softmax_over_the_allowed_columns() -> None:
    logits = [0.5, 2.0, -1.0, 3.0]
    forbidden_1G = torch.tensor([[False, False, False, True]])
    draws = 40_000
    drawn = sample_hard_negatives(
        torch.tensor([logits]).expand(draws, -1),
        forbidden_1G.expand(draws, -1),
        noise(draws, 4),
    )
    weights = [math.exp(value) for value in logits[:3]]
    surprise = 0.0
    for column, weight in enumerate(weights):
        expected = draws * weight / sum(weights)
        surprise += (int((drawn == column).sum()) - expected) ** 2 / expected
    assert surprise < 18.4  # chi-square of 2 degrees of freedom: once in 10,000
    assert not (drawn == 3).any()


def test_forbidden_columns_are_never_drawn_even_when_far_ahead() -> None:
    similarity_BG = torch.full((64, 8), -200.0)
    similarity_BG[:, 2] = 200.0
    forbidden_BG = torch.zeros(64, 8, dtype=torch.bool)
    forbidden_BG[:, 2] = True
    drawn_B = sample_hard_negatives(similarity_BG, forbidden_BG, noise(*similarity_BG.shape))
    assert not (drawn_B == 2).any()
    assert len(drawn_B.unique()) > 3


def test_sampling_leaves_its_inputs_alone_and_takes_no_gradient() -> None:
    similarity_BG = torch.randn(4, 6, requires_grad=True)
    forbidden_BG = torch.eye(4, 6, dtype=torch.bool)
    before = similarity_BG.detach().clone(), forbidden_BG.clone()
    drawn_B = sample_hard_negatives(similarity_BG, forbidden_BG, noise(*similarity_BG.shape))
    assert torch.equal(similarity_BG, before[0])
    assert torch.equal(forbidden_BG, before[1])
    assert not drawn_B.requires_grad


def test_values_of_any_size_never_draw_a_forbidden_column() -> None:
    similarity_BG = torch.tensor([[1e38, -1e38, 1e30, math.nan], [math.inf, math.nan, -math.inf, 0.0]])
    forbidden_BG = torch.tensor([[True, False, False, False], [True, False, False, True]])
    for seed in range(50):
        drawn_B = sample_hard_negatives(similarity_BG, forbidden_BG, noise(2, 4, seed))
        assert not forbidden_BG[torch.arange(2), drawn_B].any()
        assert drawn_B[0] == 2


def test_rows_without_an_allowed_column_say_so() -> None:
    forbidden_BG = torch.tensor([[True, True], [True, False]])
    drawn_B = sample_hard_negatives(torch.zeros(2, 2), forbidden_BG, noise(2, 2))
    assert drawn_B.tolist() == [NO_NEGATIVE, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_do_not_crash_the_draw(bad: float) -> None:
    forbidden_BG = torch.eye(3, dtype=torch.bool)
    drawn_B = sample_hard_negatives(torch.full((3, 3), bad), forbidden_BG, noise(3, 3))
    assert all(drawn_B[row] != row and 0 <= drawn_B[row] < 3 for row in range(3))


def test_half_precision_similarities_are_drawn_from_in_float32() -> None:
    similarity_BG = torch.tensor([[0.0, 60.0, 61.0]], dtype=torch.bfloat16).expand(2000, -1)
    forbidden_BG = torch.tensor([[True, False, False]]).expand(2000, -1)
    drawn_B = sample_hard_negatives(similarity_BG, forbidden_BG, noise(*similarity_BG.shape))
    expected = math.exp(60) / (math.exp(60) + math.exp(61))
    assert abs(float((drawn_B == 1).double().mean()) - expected) < 0.05


def test_labels_are_one_to_two_and_missing_negatives_are_ignored() -> None:
    labels = matching_labels(torch.tensor([1, NO_NEGATIVE]), torch.tensor([0, 1]))
    assert labels.tolist() == [1, 1, 0, IGNORE_INDEX, 0, 0]


def _naive_loss(images: list[int], texts: list[int], image_ids: list[int]) -> tuple[float, float]:
    """Every pair scored on its own, in the order of the paper; returns loss and accuracy."""
    model, batch = fake_model(), fake_batch(len(image_ids), image_ids=image_ids)
    rows = range(len(image_ids))
    pairs = [(i, i, 1) for i in rows] + [(images[i], i, 0) for i in rows] + [(i, texts[i], 0) for i in rows]
    losses, hits = [], []
    with torch.no_grad():
        tokens_BPI = model.image_tokens(batch.pixel_values)
        for image, text, label in pairs:
            logits_2 = model.matching_logits(
                tokens_BPI[image : image + 1],
                batch.input_ids[text : text + 1],
                batch.attention_mask[text : text + 1],
            )[0].tolist()
            losses.append(math.log(math.exp(logits_2[0]) + math.exp(logits_2[1])) - logits_2[label])
            hits.append((logits_2[1] > logits_2[0]) == bool(label))
    return sum(losses) / len(losses), sum(hits) / len(hits)


def test_objective_equals_scoring_every_pair_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = iter([torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])])  # images first, then texts
    monkeypatch.setattr(matching, "sample_hard_negatives", lambda *_: next(chosen))
    output = MatchingObjective()(build_context(fake_model(), fake_batch(3), gather_gradients=True))
    loss, accuracy = _naive_loss([2, 0, 1], [1, 2, 0], [0, 1, 2])
    assert abs(float(output.loss) - loss) < 1e-12
    assert abs(float(output.metrics["itm_accuracy"]) - accuracy) < 1e-6
    assert float(output.metrics["itm_missing_negatives"]) == 0.0


def test_two_captions_of_one_image_are_never_each_others_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    sample = sample_hard_negatives

    def spy(*args: torch.Tensor) -> torch.Tensor:
        drawn.append(sample(*args))
        return drawn[-1]

    monkeypatch.setattr(matching, "sample_hard_negatives", spy)
    image_ids = [4, 9, 4, 9, 4]
    for seed in range(20):
        batch = fake_batch(5, image_ids=image_ids)
        MatchingObjective(hard_share=(0.0, 0.5, 1.0)[seed % 3])(
            build_context(fake_model(), batch, draw=Draw(seed, step=0))
        )
    assert len(drawn) == 40
    assert all(image_ids[row] != image_ids[int(column)] for columns in drawn for row, column in enumerate(columns))


def test_repeated_texts_are_no_negatives_when_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden: list[torch.Tensor] = []

    def spy(similarity: torch.Tensor, mask_BG: torch.Tensor, *_: object) -> torch.Tensor:
        forbidden.append(mask_BG)
        return torch.zeros(len(similarity), dtype=torch.int64)

    monkeypatch.setattr(matching, "sample_hard_negatives", spy)
    batch = fake_batch(3, image_ids=[4, 5, 5])
    batch.input_ids[2], batch.attention_mask[2] = batch.input_ids[0], batch.attention_mask[0]
    for same_text_matches in (False, True):
        context = build_context(fake_model(), batch, gather_gradients=True)
        MatchingObjective(same_text_matches=same_text_matches)(context)
    assert forbidden[0].tolist() == [[True, False, False], [False, True, True], [False, True, True]]
    assert forbidden[2].tolist() == [[True, False, True], [False, True, True], [True, True, True]]


def test_lavis_pre_training_forbids_the_own_pair_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden: list[torch.Tensor] = []

    def spy(similarity: torch.Tensor, mask_BG: torch.Tensor, *_: object) -> torch.Tensor:
        forbidden.append(mask_BG)
        return torch.zeros(len(similarity), dtype=torch.int64)

    monkeypatch.setattr(matching, "sample_hard_negatives", spy)
    context = build_context(fake_model(), fake_batch(3, image_ids=[7, 7, 7]), gather_gradients=False)
    MatchingObjective(same_image_matches=False)(context)
    own_pair = [[row == column for column in range(3)] for row in range(3)]
    assert [mask_BG.tolist() for mask_BG in forbidden] == [own_pair, own_pair]


@pytest.mark.parametrize("image_ids", [[3], [3, 3]])
@pytest.mark.parametrize("hard", [1.0, 0.5, 0.0])
def test_without_any_negative_only_positives_count(image_ids: list[int], hard: float) -> None:
    model = fake_model()
    batch = fake_batch(len(image_ids), image_ids=image_ids)
    output = MatchingObjective(hard_share=hard)(build_context(model, batch, gather_gradients=True))
    output.loss.backward()
    with torch.no_grad():
        logits_B2 = model.matching_logits(model.image_tokens(batch.pixel_values), batch.input_ids, batch.attention_mask)
    expected = sum(math.log(math.exp(a) + math.exp(b)) - b for a, b in logits_B2.tolist()) / len(image_ids)
    assert abs(float(output.loss) - expected) < 1e-12
    assert float(output.metrics["itm_missing_negatives"]) == 1.0
    assert all(torch.isfinite(item.grad).all() for item in model.parameters() if item.grad is not None)


def test_loss_of_half_precision_logits_is_taken_in_float32() -> None:
    context = build_context(fake_model().bfloat16(), fake_batch(4), gather_gradients=True)
    assert MatchingObjective()(context).loss.dtype == torch.float32


def test_hard_share_is_the_share_of_rows_drawn_by_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    flattened = []

    def spy(similarity: torch.Tensor, *_: object) -> torch.Tensor:
        flattened.extend((similarity == 0).all(dim=1).tolist())
        return torch.zeros(len(similarity), dtype=torch.int64)

    monkeypatch.setattr(matching, "sample_hard_negatives", spy)
    for seed in range(60):
        context = build_context(fake_model(), fake_batch(6), draw=Draw(0, step=seed))
        MatchingObjective(hard_share=0.25)(context)
    assert len(flattened) == 60 * 2 * 6
    assert abs(sum(flattened) / len(flattened) - 0.75) < 0.06


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_hard_share_outside_zero_to_one_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="give a number from 0 to 1"):
        MatchingObjective(hard_share=share)
