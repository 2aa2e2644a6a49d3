"""Micro-batches: loss and gradient of the whole batch, one extra forward pass at most, and less memory."""

from typing import Any

import pytest
import torch
from tiny_model import random_images, random_text, tiny_stage1
from torch import Tensor, nn

from blip2train.batch import Stage1Batch
from blip2train.errors import ConfigError
from blip2train.model.live_memory import LiveMemory
from blip2train.objective import chunk
from blip2train.objective.chunk import chunk_sizes, run_in_chunks
from blip2train.objective.context import build_context
from blip2train.objective.contrastive import ContrastiveObjective
from blip2train.objective.grounded_generation import GroundedGenerationObjective
from blip2train.objective.matching import MatchingObjective
from blip2train.stage.stage1 import Stage1Module

LENGTHS = [5, 3, 4, 7, 2, 3, 6]
OBJECTIVES = {
    "itc": ContrastiveObjective(),
    "itm": MatchingObjective(),
    "itg": GroundedGenerationObjective(dec_id=4),
}


def batch() -> Stage1Batch:
    keys = [str(row) for row in range(len(LENGTHS))]
    return Stage1Batch(random_images(7), *random_text(LENGTHS), torch.arange(7), keys)


def step(
    model: nn.Module, micro_batch_size: int | None, names: tuple[str, ...] = ("itc", "itm", "itg")
) -> dict[str, Tensor]:
    """Losses and gradients."""
    model.zero_grad(set_to_none=True)
    context = build_context(model, batch(), micro_batch_size=micro_batch_size)  # type: ignore[arg-type]
    losses = {name: OBJECTIVES[name](context).loss for name in names}
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: item.grad for name, item in model.named_parameters() if item.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()} | gradients


@pytest.mark.parametrize(
    ("names", "dtype", "atol", "vision"),
    [
        (("itc",), torch.float64, 1e-10, {}),
        (("itm",), torch.float64, 1e-10, {}),
        (("itg",), torch.float64, 1e-10, {}),
        (("itc", "itm", "itg"), torch.float64, 1e-10, {"trainable_blocks": 1}),
        (("itc", "itm", "itg"), torch.float32, 1e-5, {}),
    ],
)
def test_micro_batches_have_the_loss_and_gradients_of_the_whole_batch(
    names: tuple[str, ...], dtype: torch.dtype, atol: float, vision: dict[str, Any]
) -> None:
    model = tiny_stage1(vision=vision).to(dtype).eval()
    whole = step(model, None, names)
    for size in (1, 3, 5):  # 7 pairs: none divides them but 1
        parts = step(model, size, names)
        assert parts.keys() == whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(
                parts[name], expected, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_a_micro_batch_as_large_as_the_batch_is_the_plain_step() -> None:
    model = tiny_stage1().train()
    for size in (7, 100):
        torch.manual_seed(0)
        whole = step(model, None)
        torch.manual_seed(0)
        same = step(model, size)
        assert all(torch.equal(same[name], expected) for name, expected in whole.items())


def test_dropout_has_the_same_masks_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without recomputation the chunks draw their masks in the same order: the gradients must be the same bits."""
    model = tiny_stage1().double().train()
    torch.manual_seed(0)
    again = step(model, 3)
    monkeypatch.setattr(chunk, "_checkpointed", lambda function, arguments: function(*arguments))
    torch.manual_seed(0)
    kept = step(model, 3)
    torch.manual_seed(1)
    other = step(model, 3)
    assert all(torch.equal(again[name], expected) for name, expected in kept.items())
    assert not torch.equal(again["itc"], other["itc"])


def rows_through(model: nn.Module, micro_batch_size: int | None) -> dict[str, int]:
    """Rows that each linear layer multiplies in a step, the backward pass included."""
    rows: dict[str, int] = {}

    def hook(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            rows[name] = rows.get(name, 0) + inputs[0].shape[:-1].numel()

        return add

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers]
    step(model, micro_batch_size)
    for item in hooks:
        item.remove()
    return rows


def test_micro_batches_cost_one_more_forward_pass_and_the_encoder_and_its_projections_none() -> None:
    model = tiny_stage1().train()
    plain, parts = rows_through(model, None), rows_through(model, 3)
    assert plain.keys() == parts.keys() and len(plain) > 40
    for name, rows in plain.items():
        once = name.startswith("vision_encoder") or "cross_attention.key" in name or "cross_attention.value" in name
        assert parts[name] == rows if once else parts[name] <= 2 * rows, name


def peak(model: nn.Module, micro_batch_size: int | None) -> int:
    with LiveMemory([*model.parameters(), *model.buffers()]) as memory:
        step(model, micro_batch_size)
    return sum(memory.peak.values())


def test_micro_batches_take_less_memory() -> None:
    model = tiny_stage1().train()
    step(model, None)  # what is made once
    assert peak(model, 1) < peak(model, 3) < 0.8 * peak(model, None)


@pytest.mark.parametrize(
    ("rows", "most", "size", "expected"),
    [
        (7, 7, None, [7]),
        (7, 7, 7, [7]),
        (7, 7, 3, [3, 2, 2]),
        (2, 4, 1, [1, 1, 0, 0]),
        (4, 4, 9, [4]),
        (3, 7, 4, [2, 1]),
    ],
)
def test_rows_are_shared_evenly_and_every_rank_has_as_many_chunks(
    rows: int, most: int, size: int | None, expected: list[int]
) -> None:
    assert chunk_sizes(rows, most, size) == expected


def test_nested_rows_and_results_keep_their_nesting() -> None:
    first, second = torch.arange(5.0), torch.arange(10.0).view(5, 2)

    def swap(nested: list[Any], nothing: None) -> tuple[Any, dict[str, Any]]:
        assert nothing is None
        return nested[1][0], {"first": nested[0], "nothing": None}

    found = run_in_chunks(swap, [2, 0, 3], [first, (second, None)], None)
    assert torch.equal(found[0], second) and torch.equal(found[1]["first"], first) and found[1]["nothing"] is None


def test_without_gradients_nothing_is_run_again() -> None:
    calls: list[int] = []

    def count(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows

    with torch.no_grad():
        run_in_chunks(count, [2, 3], torch.zeros(5))
    assert calls == [2, 3]


@pytest.mark.parametrize("size", [0, -3, 2.5, True, "all"])
def test_a_micro_batch_that_is_no_number_of_pairs_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="micro_batch_size is"):
        Stage1Module(build_model=tiny_stage1, objectives=OBJECTIVES, build_optim=lambda _: None, micro_batch_size=size)  # type: ignore[arg-type, return-value]
