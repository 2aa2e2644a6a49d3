"""Activation checkpointing of the Q-Former changes no value and no gradient, in any pass, and keeps fewer bytes."""

from collections.abc import Callable

import pytest
import torch
from tiny_model import random_text, tiny_qformer
from torch import Tensor

from blip2train.model.qformer.qformer import QFormer

IDS, MASK = random_text([6, 4, 1])
IMAGE = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(3))


def image_pass(qformer: QFormer, image: Tensor) -> Tensor:
    return qformer.encode_image(image).hidden


def text_pass(qformer: QFormer, image: Tensor) -> Tensor:
    return qformer.encode_text(IDS, MASK, rows=1)


def matching_pass(qformer: QFormer, image: Tensor) -> Tensor:
    """As the matching loss: the image pass's keys and values again, and an image that meets two texts."""
    states = qformer.encode_image(image)
    return qformer.fuse(states.image, IDS, MASK, image_rows=torch.tensor([2, 0, 2]))


def generation_pass(qformer: QFormer, image: Tensor) -> Tensor:
    """Gradients reach queries and image only through the cached keys and values, which LAVIS's checkpointing loses."""
    return qformer.lm_logits(qformer.decode(IDS, MASK, qformer.encode_image(image)))


def all_passes(qformer: QFormer, image: Tensor) -> Tensor:
    states = qformer.encode_image(image)
    parts = [states.hidden, qformer.encode_text(IDS, MASK), qformer.fuse(states.image, IDS, MASK)]
    parts.append(qformer.decode(IDS, MASK, states))
    return torch.cat([part.flatten() for part in parts])


PASSES = [image_pass, text_pass, matching_pass, generation_pass, all_passes]


def value_and_gradients(
    run: Callable[[QFormer, Tensor], Tensor], *, checkpoint: bool, dropout: float, autocast: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    qformer = tiny_qformer(dropout=dropout, checkpoint_activations=checkpoint).train()
    qformer = qformer if autocast else qformer.double()
    image = IMAGE.to(qformer.query_tokens.dtype).requires_grad_()
    torch.manual_seed(11)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = run(qformer, image)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    (output * weights).sum().backward()
    gradients = {name: value.grad for name, value in qformer.named_parameters() if value.grad is not None}
    return output.detach(), gradients | ({} if image.grad is None else {"image": image.grad})


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("run", PASSES)
def test_values_and_gradients_are_those_without_it(run: Callable, dropout: float) -> None:
    expected, wanted = value_and_gradients(run, checkpoint=False, dropout=dropout)
    output, gradients = value_and_gradients(run, checkpoint=True, dropout=dropout)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-12, msg=name)
    if run in (generation_pass, all_passes):
        assert gradients["query_tokens"].abs().max() > 1e-4 and gradients["image"].abs().max() > 1e-4


def test_dropout_really_was_on() -> None:
    with_dropout, _ = value_and_gradients(all_passes, checkpoint=True, dropout=0.3)
    without, _ = value_and_gradients(all_passes, checkpoint=True, dropout=0.0)
    assert not torch.allclose(with_dropout, without, atol=1e-2)


def test_under_autocast_too() -> None:
    expected, wanted = value_and_gradients(all_passes, checkpoint=False, dropout=0.0, autocast=True)
    output, gradients = value_and_gradients(all_passes, checkpoint=True, dropout=0.0, autocast=True)
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-2, atol=1e-3, msg=name)


def kept_bytes(run: Callable[[QFormer, Tensor], Tensor], *, checkpoint: bool) -> int:
    """Bytes that the backward pass needs: what autograd saves, and what every block takes in and gives out.

    A tensor counts once. Inside a checkpointed block nothing reaches these hooks: it is computed again.
    """
    qformer = tiny_qformer(num_layers=6, checkpoint_activations=checkpoint).train()
    weights = {value.untyped_storage().data_ptr() for value in qformer.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    def keep_ends(_: object, inputs: tuple, named: dict, output: tuple) -> None:
        pairs = [named[name] or () for name in ("image", "past")]
        for tensor in (inputs[0], *pairs[0], *pairs[1], output[0], *output[1]):
            keep(tensor)

    for block in qformer.blocks:
        block.register_forward_hook(keep_ends, with_kwargs=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(qformer, IMAGE)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("run", PASSES)
def test_fewer_bytes_are_kept(run: Callable) -> None:
    whole, few = kept_bytes(run, checkpoint=False), kept_bytes(run, checkpoint=True)
    assert few < 0.55 * whole, f"{few} of {whole} bytes"


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_nothing_is_computed_twice_without_training(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("checkpointed")

    monkeypatch.setattr("blip2train.model.qformer.qformer.checkpoint", refuse)
    qformer = tiny_qformer(checkpoint_activations=True)
    qformer.train(mode != "eval")
    with torch.set_grad_enabled(mode != "no_grad"):
        all_passes(qformer, IMAGE)
    with pytest.raises(AssertionError, match="checkpointed"):
        all_passes(qformer.train(), IMAGE)
