"""Seeded nucleus sampling: the distribution of transformers' own, with draws that belong to the image."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from blip2train.capfilt.sampling import SeededNucleus, draw_uniforms


@pytest.mark.parametrize(("top_p", "temperature"), [(0.9, 1.0), (0.5, 0.7), (1.0, 1.3), (0.01, 1.0)])
def test_every_token_is_drawn_as_often_as_transformers_would(top_p: float, temperature: float) -> None:
    number = 20_000
    logits_V = 2 * torch.randn(12, generator=torch.Generator().manual_seed(3))
    logits_V[4] = -torch.inf
    scores = logits_V.expand(number, -1).clone()
    evenly = (torch.arange(number) + 0.5)[:, None] / number
    chosen = SeededNucleus(evenly, top_p, temperature)(torch.zeros(number, 1, dtype=torch.int64), scores)
    shares = torch.bincount(chosen.argmax(dim=1), minlength=12) / number
    warped = TemperatureLogitsWarper(temperature)(None, logits_V[None].clone())
    expected = TopPLogitsWarper(top_p)(None, warped).softmax(dim=1)[0]
    assert torch.allclose(shares, expected, atol=2 / number)


def test_one_token_per_row_is_left_and_multinomial_must_take_it() -> None:
    scores = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    chosen = SeededNucleus(draw_uniforms(0, ["k"], 50, 1), 0.9)(torch.zeros(50, 3, dtype=torch.int64), scores)
    assert (chosen > -torch.inf).sum(dim=1).eq(1).all()
    drawn = torch.multinomial(chosen.softmax(dim=1), 1)[:, 0]
    assert torch.equal(drawn, chosen.argmax(dim=1))


def test_the_largest_uniform_stays_inside_the_nucleus() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, -4.0]])
    almost_one = torch.tensor([[1.0 - 2**-24]])
    chosen = SeededNucleus(almost_one, 0.8)(torch.zeros(1, 0, dtype=torch.int64), scores)
    assert int(chosen.argmax()) == 1, "0.66 and 0.24 make up the nucleus of 0.8"


def test_draws_depend_on_the_key_alone() -> None:
    whole = draw_uniforms(7, ["a", "b", "c"], 4, 9).view(3, 4, 9)
    assert torch.equal(draw_uniforms(7, ["c", "a"], 4, 9).view(2, 4, 9), whole[[2, 0]])
    assert torch.equal(draw_uniforms(7, ["b"], 2, 5), whole[1, :2, :5]), "fewer captions, fewer tokens"
    assert whole.flatten().unique().numel() == whole.numel()
    assert not torch.equal(draw_uniforms(8, ["a"], 4, 9), whole[0])


def test_the_step_counts_from_the_first_call_whatever_the_prompt_is() -> None:
    uniforms = torch.tensor([[0.0, 1 - 2**-24]])
    choose = SeededNucleus(uniforms)
    scores = torch.zeros(1, 5)
    first = choose(torch.zeros(1, 7, dtype=torch.int64), scores).argmax()
    second = choose(torch.zeros(1, 8, dtype=torch.int64), scores).argmax()
    assert (int(first), int(second)) == (0, 4)
