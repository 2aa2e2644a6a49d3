"""What no loss reaches, against a real backward pass; and that looking for it changes nothing."""

import pytest
import torch

from blip2train.model.freezing import checkpoint_state_dict, count_parameters, set_aside, trainable_state_dict
from blip2train.model.idle import idle_parameters
from blip2train.objective.context import ContextSettings, Stage1Context
from blip2train.objective.contrastive import ContrastiveObjective
from blip2train.objective.draw import Draw
from blip2train.objective.grounded_generation import GroundedGenerationObjective
from blip2train.objective.matching import MatchingObjective
from blip2train.stage.probe import empty_stage1_batch
from tests.tiny_model import tiny_stage1

OBJECTIVES = {
    "all": [ContrastiveObjective(), MatchingObjective(), GroundedGenerationObjective(dec_id=2)],
    "itc": [ContrastiveObjective()],
    "itm": [MatchingObjective()],
    "itm_evenly": [MatchingObjective(hard_share=0.0)],
    "itg": [GroundedGenerationObjective(dec_id=2)],
}


def loss_of(model, objectives):
    batch = empty_stage1_batch(model.vision_encoder, pairs=2, tokens=3)
    context = Stage1Context(model, batch, ContextSettings(), Draw(0, 0))
    return torch.stack([objective(context).loss for objective in objectives]).sum()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_idle_is_what_a_real_backward_pass_leaves_without_gradient(name: str) -> None:
    model = tiny_stage1(vision={"trainable_blocks": 1})
    idle = idle_parameters(model, lambda: loss_of(model, OBJECTIVES[name]))
    loss_of(model, OBJECTIVES[name]).backward()
    without = [key for key, item in model.named_parameters() if item.requires_grad and item.grad is None]
    assert idle == without
    assert bool(idle) == (name != "all")


def test_looking_changes_neither_weights_nor_random_numbers_nor_modes() -> None:
    model = tiny_stage1().train()
    before = {name: (id(item), item.clone()) for name, item in model.named_parameters()}
    buffers = {name: id(item) for name, item in model.named_buffers()}
    state = torch.get_rng_state()
    idle_parameters(model, lambda: loss_of(model, OBJECTIVES["itc"]))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: id(item) for name, item in model.named_buffers()} == buffers
    assert all(before[name][0] == id(item) for name, item in model.named_parameters())
    assert all(torch.equal(before[name][1], item) for name, item in model.named_parameters())
    assert model.qformer.training and all(item.grad is None for item in model.parameters())


def test_a_loss_that_fails_leaves_the_real_weights_in_the_model() -> None:
    model = tiny_stage1()
    weights = {id(item) for item in model.parameters()}

    def fail() -> torch.Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        idle_parameters(model, fail)
    assert {id(item) for item in model.parameters()} == weights


def test_what_is_set_aside_stays_in_checkpoints_and_out_of_training() -> None:
    model = tiny_stage1()
    whole, (trained, frozen) = checkpoint_state_dict(model), count_parameters(model)
    set_aside(model, ["itm_head.weight", "itm_head.bias"])
    assert checkpoint_state_dict(model).keys() == whole.keys()
    assert "itm_head.weight" not in trainable_state_dict(model)
    size = model.itm_head.weight.numel() + 2
    assert count_parameters(model) == (trained - size, frozen + size)
