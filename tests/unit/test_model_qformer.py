"""The Q-Former: what a mask hides changes nothing, what it shows does; verbs equal one pass under an explicit mask."""

from collections.abc import Callable

import pytest
import torch
from tiny_model import random_text, tiny_qformer
from torch import Tensor

from blip2train.errors import ConfigError
from blip2train.model.qformer.mask import bidirectional, multimodal_causal, unimodal
from blip2train.model.qformer.qformer import QFormer

Q, P = 5, 7
IDS, MASK = random_text([6, 4, 1])


def image_tokens(count: int = 3) -> Tensor:
    return torch.randn(count, P, 24, generator=torch.Generator().manual_seed(3))


def other_token(ids: Tensor, column: int) -> Tensor:
    changed = ids.clone()
    changed[:, column] = 5 + (changed[:, column] + 7) % 30
    return changed


def differs(left: Tensor, right: Tensor) -> bool:
    """Every row of the batch changed."""
    return bool((left != right).flatten(1).any(dim=1).all())


@torch.no_grad()
def run_joint(mask: Callable[[int, Tensor], Tensor], image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Query rows and text rows of one pass."""
    full = torch.ones(ids.shape, dtype=torch.bool)
    hidden = tiny_qformer().eval().joint(image, ids, full, mask(Q, full))
    return hidden[:, :Q], hidden[:, Q:]


def test_unimodal_text_never_reaches_queries_nor_queries_text() -> None:
    queries, text = run_joint(unimodal, image_tokens(), IDS)
    other_text_queries, other_text = run_joint(unimodal, image_tokens(), other_token(IDS, 2))
    other_image_queries, other_image_text = run_joint(unimodal, image_tokens() + 1, IDS)
    assert torch.equal(queries, other_text_queries)
    assert torch.equal(text, other_image_text)
    assert differs(queries, other_image_queries)
    assert differs(text, other_text)


def test_causal_text_sees_queries_and_its_past_only() -> None:
    queries, text = run_joint(multimodal_causal, image_tokens(), IDS)
    later_queries, later_text = run_joint(multimodal_causal, image_tokens(), other_token(IDS, 3))
    _, other_image_text = run_joint(multimodal_causal, image_tokens() + 1, IDS)
    assert torch.equal(queries, later_queries)
    assert torch.equal(text[:, :3], later_text[:, :3])
    assert all(differs(text[:, t], later_text[:, t]) for t in (3, 4, 5))
    assert all(differs(text[:, t], other_image_text[:, t]) for t in range(6))


def test_bidirectional_everything_reaches_everything() -> None:
    queries, text = run_joint(bidirectional, image_tokens(), IDS)
    for changed in (
        run_joint(bidirectional, image_tokens(), other_token(IDS, 5)),
        run_joint(bidirectional, image_tokens() + 1, IDS),
    ):
        assert all(differs(queries[:, q], changed[0][:, q]) for q in range(Q))
        assert all(differs(text[:, t], changed[1][:, t]) for t in range(6))


@torch.no_grad()
def test_padding_changes_nothing_exactly() -> None:
    qformer = tiny_qformer().eval()
    garbage = torch.where(MASK, IDS, 39)
    past = qformer.encode_image(image_tokens())
    assert torch.equal(qformer.encode_text(IDS, MASK)[MASK], qformer.encode_text(garbage, MASK)[MASK])
    assert torch.equal(qformer.decode(IDS, MASK, past)[MASK], qformer.decode(garbage, MASK, past)[MASK])
    assert torch.equal(qformer.fuse(image_tokens(), IDS, MASK), qformer.fuse(image_tokens(), garbage, MASK))


@torch.no_grad()
def test_longer_padding_gives_the_same_states() -> None:
    qformer = tiny_qformer().double().eval()
    longer, longer_mask = torch.nn.functional.pad(IDS, (0, 4)), torch.nn.functional.pad(MASK, (0, 4))
    image = image_tokens().double()
    past = qformer.encode_image(image)
    for short, long in (
        (qformer.encode_text(IDS, MASK)[MASK], qformer.encode_text(longer, longer_mask)[longer_mask]),
        (qformer.decode(IDS, MASK, past)[MASK], qformer.decode(longer, longer_mask, past)[longer_mask]),
        (qformer.fuse(image, IDS, MASK), qformer.fuse(image, longer, longer_mask)),
    ):
        torch.testing.assert_close(short, long, rtol=0, atol=1e-12)


def test_a_row_of_padding_alone_stays_finite_forward_and_backward() -> None:
    qformer = tiny_qformer().train()
    mask = MASK.clone()
    mask[1] = False
    past = qformer.encode_image(image_tokens())
    outputs = [qformer.encode_text(IDS, mask), qformer.fuse(image_tokens(), IDS, mask), qformer.decode(IDS, mask, past)]
    sum(output.square().sum() for output in outputs).backward()
    assert all(output.isfinite().all() for output in outputs)
    assert all(p.grad is None or p.grad.isfinite().all() for p in qformer.parameters())


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 2, 3])
def test_verbs_equal_one_pass_under_the_explicit_mask_in_float64(every: int) -> None:
    qformer = tiny_qformer(cross_attention_every=every).double().eval()
    image = image_tokens().double()
    past = qformer.encode_image(image)
    joint_unimodal = qformer.joint(image, IDS, MASK, unimodal(Q, MASK))
    joint_causal = qformer.joint(image, IDS, MASK, multimodal_causal(Q, MASK))
    joint_bidirectional = qformer.joint(image, IDS, MASK, bidirectional(Q, MASK))
    for name, verb, joint in (
        ("encode_image", past.hidden, joint_unimodal[:, :Q]),
        ("encode_text", qformer.encode_text(IDS, MASK), joint_unimodal[:, Q:]),
        ("encode_text, one row", qformer.encode_text(IDS, MASK, rows=1), joint_unimodal[:, Q : Q + 1]),
        ("query rows under the causal mask", past.hidden, joint_causal[:, :Q]),
        ("decode", qformer.decode(IDS, MASK, past), joint_causal[:, Q:]),
        ("fuse", qformer.fuse(image, IDS, MASK), joint_bidirectional[:, :Q]),
    ):
        torch.testing.assert_close(verb, joint, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_decoding_on_cached_states_has_the_gradients_of_one_pass() -> None:
    gradients = []
    for cached in (True, False):
        qformer = tiny_qformer(dropout=0.0).double()
        image = image_tokens().double().requires_grad_()
        if cached:
            states = qformer.decode(IDS, MASK, qformer.encode_image(image))
        else:
            states = qformer.joint(image, IDS, MASK, multimodal_causal(Q, MASK))[:, Q:]
        qformer.lm_logits(states[MASK]).square().mean().backward()
        # what the cached form does not compute (query rows of the last layer) the one-pass form computes for nothing
        named = {"image": image} | dict(qformer.named_parameters())
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_fuse_on_chosen_images_equals_stacked_images_with_gradients() -> None:
    rows, results = torch.tensor([0, 2, 1, 2]), []
    ids, mask = random_text([6, 4, 1, 3])
    for stacked in (True, False):
        qformer = tiny_qformer(dropout=0.0).double()
        image = image_tokens().double().requires_grad_()
        fused = (
            qformer.fuse(image[rows], ids, mask)
            if stacked
            else qformer.fuse(qformer.encode_image(image).image, ids, mask, rows)
        )
        fused.square().sum().backward()
        results.append((fused.detach(), image.grad, qformer.blocks[0].cross_attention.key.weight.grad))
    for stacked_result, chosen_result in zip(*results, strict=True):
        torch.testing.assert_close(stacked_result, chosen_result, rtol=1e-12, atol=1e-12)


def test_dropout_acts_in_training_only() -> None:
    qformer = tiny_qformer()
    assert differs(qformer.train().encode_image(image_tokens()).hidden, qformer.encode_image(image_tokens()).hidden)
    qformer.eval()
    assert torch.equal(qformer.encode_image(image_tokens()).hidden, qformer.encode_image(image_tokens()).hidden)


def test_lm_head_is_tied_to_the_word_embeddings() -> None:
    qformer = tiny_qformer()
    assert not [name for name, p in qformer.lm_head.named_parameters() if p.shape == (40, 24)]
    qformer.lm_logits(torch.randn(2, 24)).sum().backward()
    assert qformer.text_embeddings.word.weight.grad.abs().sum() > 0


def test_initial_weights_are_berts() -> None:
    torch.manual_seed(0)
    qformer = QFormer(
        hidden_size=96, num_layers=2, num_heads=4, num_queries=32, cross_attention_every=2, image_dim=64,
        vocab_size=300, intermediate_size=192, max_positions=32, dropout=0.1,
    )  # fmt: skip
    assert not qformer.text_embeddings.word.weight[0].any()
    for name, parameter in qformer.named_parameters():
        if "norm" in name:
            assert bool((parameter == (1 if name.endswith("weight") else 0)).all()), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.002, name


def test_dropping_the_text_branch_leaves_image_states_unchanged_and_no_text_parameter() -> None:
    qformer = tiny_qformer().eval()
    before = qformer.encode_image(image_tokens()).hidden
    qformer.drop_text_branch()
    assert torch.equal(qformer.encode_image(image_tokens()).hidden, before)
    assert not [name for name, _ in qformer.named_parameters() if "text" in name or "lm_head" in name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "hidden_size 24 is not a multiple of num_heads 5"),
        ({"num_queries": 0}, "num_queries is 0"),
        ({"cross_attention_every": 0}, "cross_attention_every is 0"),
        ({"pad_id": 40}, "pad_id 40 is outside the vocabulary of 40"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_qformer(**change)


def test_a_text_longer_than_the_positions_is_refused_with_both_numbers() -> None:
    ids, mask = random_text([17])
    with pytest.raises(ConfigError, match=r"17 tokens.*16 positions"):
        tiny_qformer().encode_text(ids, mask)


def test_image_tokens_of_another_width_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"width 30.*built for 24"):
        tiny_qformer().encode_image(torch.randn(1, P, 30))
