"""The three masks against Figure 2, read cell by cell."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blip2train.model.qformer.mask import bidirectional, multimodal_causal, unimodal

Q, T = 2, 3
TEXT_MASK = torch.tensor([[True, True, True], [True, True, False]])
FIGURE_2 = {
    unimodal: ["QQ...", "QQ...", "..TTT", "..TTT", "..TTT"],
    multimodal_causal: ["QQ...", "QQ...", "QQT..", "QQTT.", "QQTTT"],
    bidirectional: ["QQTTT"] * 5,
}


@pytest.mark.parametrize("mask", FIGURE_2)
def test_mask_is_figure_2_with_padded_columns_closed(mask: Callable[[int, Tensor], Tensor]) -> None:
    drawn = torch.tensor([[cell != "." for cell in row] for row in FIGURE_2[mask]])
    without_last_token = drawn.clone()
    without_last_token[:, -1] = False
    built = mask(Q, TEXT_MASK)
    assert built.dtype == torch.bool
    assert torch.equal(built, torch.stack([drawn, without_last_token]))


@pytest.mark.parametrize("mask", FIGURE_2)
def test_no_query_row_is_empty_even_without_any_text(mask: Callable[[int, Tensor], Tensor]) -> None:
    built = mask(Q, torch.zeros(1, T, dtype=torch.bool))
    assert built[:, :Q].any(dim=-1).all()
    assert not built[:, :, Q:].any()


@pytest.mark.parametrize("mask", FIGURE_2)
def test_text_of_length_zero_gives_the_query_block(mask: Callable[[int, Tensor], Tensor]) -> None:
    assert torch.equal(mask(Q, torch.zeros(1, 0, dtype=torch.bool)), torch.ones(1, Q, Q, dtype=torch.bool))
