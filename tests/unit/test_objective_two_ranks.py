"""Two gloo processes, averaged as DDP does, against one process with the whole batch (float64, all parameters)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_stage1 import DEC_ID, fake_batch, fake_model
from two_ranks import on_two_ranks

from blip2train.batch import Stage1Batch
from blip2train.objective import matching
from blip2train.objective.context import build_context
from blip2train.objective.contrastive import ContrastiveObjective
from blip2train.objective.grounded_generation import GroundedGenerationObjective
from blip2train.objective.matching import NO_NEGATIVE, MatchingObjective

LENGTHS = [5, 3, 4, 7, 2, 3]  # 12 tokens on each rank: the mean over a rank's tokens is then the mean over all
IMAGE_IDS = [0, 1, 2, 1, 3, 4]  # image 1 lives on both ranks
MODES = [(True, True), (True, False), (False, True)]  # gather_gradients, multi_positive


def _whole_batch() -> Stage1Batch:
    batch = fake_batch(6, length=7, image_ids=IMAGE_IDS)
    mask_BT = torch.arange(7)[None, :] < torch.tensor(LENGTHS)[:, None]
    ids_BT = torch.randint(1, DEC_ID, (6, 7), generator=torch.Generator().manual_seed(5)) * mask_BT
    return replace(batch, input_ids=ids_BT, attention_mask=mask_BT)


def _half_batch(rank: int) -> Stage1Batch:
    """Three rows with texts as long as this rank's longest: 5 tokens on rank 0, 7 on rank 1."""
    whole, rows = _whole_batch(), slice(3 * rank, 3 * rank + 3)
    longest = max(LENGTHS[rows])
    return Stage1Batch(
        pixel_values=whole.pixel_values[rows],
        input_ids=whole.input_ids[rows, :longest],
        attention_mask=whole.attention_mask[rows, :longest],
        image_ids=whole.image_ids[rows],
        keys=whole.keys[rows],
    )


def hardest(similarity: torch.Tensor, forbidden: torch.Tensor, generator: object = None) -> torch.Tensor:
    """The most similar allowed column instead of a draw, which would differ between one process and two."""
    best_B = similarity.detach().masked_fill(forbidden, -torch.inf).argmax(dim=1)
    return torch.where(forbidden.all(dim=1), NO_NEGATIVE, best_B)


def _step(batch: Stage1Batch, gather_gradients: bool, multi_positive: bool) -> dict[str, Any]:
    model = fake_model()
    context = build_context(model, batch, gather_gradients=gather_gradients)
    objectives = {
        "itc": ContrastiveObjective(multi_positive=multi_positive),
        "itm": MatchingObjective(same_image_matches=multi_positive),  # both modes of both, in two runs
        "itg": GroundedGenerationObjective(dec_id=DEC_ID),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "sample_hard_negatives", hardest)
        losses = {name: objective(context).loss for name, objective in objectives.items()}
    torch.stack(list(losses.values())).sum().backward()
    return {
        "losses": {name: float(loss) for name, loss in losses.items()},
        "gradients": {name: item.grad for name, item in model.named_parameters() if item.requires_grad},
        "negatives": hardest(context.similarity_t2i, context.same_image).tolist(),
        "own_column": context.own_column.tolist(),
    }


def _all_modes(rank: int) -> list[dict[str, Any]]:
    return [_step(_half_batch(rank), *mode) for mode in MODES]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return on_two_ranks(_all_modes, folder)


@pytest.mark.parametrize("mode", range(len(MODES)))
def test_averaged_gradients_are_those_of_one_process_with_the_double_batch(
    ranks: list[list[dict[str, Any]]], mode: int
) -> None:
    whole = _step(_whole_batch(), *MODES[mode])
    for name, expected in whole["gradients"].items():
        averaged = (ranks[0][mode]["gradients"][name] + ranks[1][mode]["gradients"][name]) / 2
        torch.testing.assert_close(averaged, expected, rtol=0, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("mode", range(len(MODES)))
def test_averaged_losses_are_those_of_one_process_with_the_double_batch(
    ranks: list[list[dict[str, Any]]], mode: int
) -> None:
    whole = _step(_whole_batch(), *MODES[mode])
    for name, expected in whole["losses"].items():
        assert abs(sum(rank[mode]["losses"][name] for rank in ranks) / 2 - expected) < 1e-13


def test_negatives_come_from_all_ranks_but_never_from_the_same_image(ranks: list[list[dict[str, Any]]]) -> None:
    columns = [column for rank in ranks for column in rank[0]["negatives"]]
    assert columns == _step(_whole_batch(), *MODES[0])["negatives"]
    assert any((row < 3) != (column < 3) for row, column in enumerate(columns)), "one negative is from the other rank"
    assert all(IMAGE_IDS[row] != IMAGE_IDS[column] for row, column in enumerate(columns))
    assert [rank[0]["own_column"] for rank in ranks] == [[0, 1, 2], [3, 4, 5]]


def test_the_two_gradient_modes_differ() -> None:
    both, one = (_step(_whole_batch(), *MODES[mode])["gradients"] for mode in (0, 2))
    assert not torch.allclose(both["words.weight"], one["words.weight"])
