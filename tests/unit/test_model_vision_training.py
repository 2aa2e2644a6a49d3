"""What trains of a vision encoder and what does not: gradients, graphs, modes, memory, and the weights after a step."""

from typing import Any

import pytest
import torch
from tiny_model import OPT, random_images, stage2_batch, tiny_stage1, tiny_stage2, tiny_vit
from torch import Tensor, nn
from vit_family import FAMILIES

from blip2train.errors import ConfigError
from blip2train.model.freezing import trainable_state_dict
from blip2train.model.language_model.decoder_only import DecoderOnly
from blip2train.model.vision_encoder.timm_vit import TimmVisionEncoder

DROPS = {"drop_path_rate": 0.9, "proj_drop_rate": 0.2}


def family_vit(family: str, model_args: dict[str, Any] | None = None, **changes: Any) -> TimmVisionEncoder:
    small = FAMILIES[family]
    return tiny_vit(name=small.name, model_args=small.model_args | (model_args or {}), **changes)


def graph_leaves(tokens: Tensor) -> set[int]:
    """Ids of the tensors that the graph behind `tokens` ends in, found by walking it."""
    leaves, seen, queue = set(), set(), [tokens.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            leaves.add(id(node.variable))
        queue += [parent for parent, _ in node.next_functions]
    return leaves


@pytest.mark.parametrize("family", ["vit", "eva", "siglip", "dinov2_reg", "dinov3"])
@pytest.mark.parametrize("trainable_blocks", [0, 1, 2, "all"])
def test_a_step_moves_what_trains_and_no_bit_of_the_rest(family: str, trainable_blocks: int | str) -> None:
    model = tiny_stage1(
        vision={
            "name": FAMILIES[family].name,
            "model_args": FAMILIES[family].model_args,
            "trainable_blocks": trainable_blocks,
        }
    )
    encoder = model.train().vision_encoder
    before = {name: parameter.detach().clone() for name, parameter in encoder.backbone.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model.encode_image(model.image_tokens(random_images(2))).hidden.square().sum().backward()
        optimizer.step()
    first = {"all": 0, 2: 0, 1: 1, 0: 2}[trainable_blocks]
    moved = {name for name, p in encoder.backbone.named_parameters() if not torch.equal(before[name], p)}
    expected = {name for name in before if name.startswith("blocks.") and int(name.split(".")[1]) >= first}
    assert moved == (set(before) if trainable_blocks == "all" else expected)
    saved = {name for name in trainable_state_dict(model) if name.startswith("vision_encoder.")}
    assert saved == {
        f"vision_encoder.backbone.{name}" for name, p in encoder.backbone.named_parameters() if p.requires_grad
    }
    assert encoder.trainable is (trainable_blocks != 0)


@pytest.mark.parametrize("family", ["vit", "eva"])
def test_no_graph_exists_below_the_first_block_that_trains(family: str) -> None:
    encoder = family_vit(family, layer=-1, trainable_blocks=1).train()
    inputs: dict[int, Tensor] = {}
    for index, block in enumerate(encoder.backbone.blocks):
        block.register_forward_pre_hook(lambda _, args, index=index: inputs.update({index: args[0]}))
    tokens = encoder(random_images(2).float().requires_grad_())
    assert {index: tensor.requires_grad for index, tensor in inputs.items()} == {0: False, 1: False, 2: False}
    assert graph_leaves(tokens) == {id(parameter) for parameter in encoder.backbone.blocks[2].parameters()}
    with torch.no_grad():
        assert not encoder(random_images(2)).requires_grad


def test_pixels_get_gradients_where_everything_trains() -> None:
    pixels = random_images(1).float().requires_grad_()
    tiny_vit(trainable_blocks="all")(pixels).square().sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("trainable_blocks", "training"),
    [(0, [False, False, False]), (1, [False, False, True]), (3, [True, True, True]), ("all", [True, True, True])],
)
def test_train_switches_only_what_trains(trainable_blocks: int | str, training: list[bool]) -> None:
    encoder = tiny_vit(layer=-1, final_norm=True, trainable_blocks=trainable_blocks)
    for mode in (True, False, True):
        encoder.train(mode)
        for block, trains in zip(encoder.backbone.blocks, training, strict=True):
            assert {module.training for module in block.modules()} == {trains and mode}
        assert encoder.backbone.patch_embed.training is (mode and trainable_blocks == "all")
        assert encoder.backbone.norm.training is (mode and trainable_blocks != 0)
        assert encoder.training is (mode and trainable_blocks != 0)


def test_the_final_norm_trains_with_the_last_blocks_where_it_is_kept() -> None:
    with_norm = tiny_vit(final_norm=True, trainable_blocks=1)
    names = {name.split(".")[0] for name, p in with_norm.backbone.named_parameters() if p.requires_grad}
    assert names == {"blocks", "norm"}
    assert not [name for name, _ in tiny_vit(trainable_blocks=1).backbone.named_parameters() if name.startswith("norm")]


def test_an_encoder_as_built_is_already_in_its_modes() -> None:
    assert not any(module.training for module in tiny_vit().modules())
    assert tiny_vit(trainable_blocks=1).backbone.blocks[1].training


@pytest.mark.parametrize("family", ["vit", "eva", "dinov3"])
def test_stochastic_depth_and_dropout_act_only_where_blocks_train(family: str) -> None:
    def differs(**changes: Any) -> bool:
        encoder = family_vit(family, DROPS, layer=-1, **changes).train()
        outputs = [encoder(random_images(4)) for _ in range(6)]
        return not all(torch.equal(outputs[0], other) for other in outputs[1:])

    assert not differs(trainable_blocks=0)
    assert differs(trainable_blocks=1)
    assert differs(trainable_blocks="all")
    encoder = family_vit(family, DROPS, layer=-1, trainable_blocks=1).train()
    seen: list[Tensor] = []
    encoder.backbone.blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for _ in range(4):
        encoder(random_images(4))
    assert all(torch.equal(seen[0], other) for other in seen[1:]), "the frozen blocks below drop nothing"


def saved_bytes(encoder: TimmVisionEncoder) -> tuple[int, dict[str, Tensor]]:
    """Bytes autograd keeps for the backward pass, weights not counted, and the gradients; seeded."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = encoder(random_images(4)).square().mean()
    loss.backward()
    return sum(kept.values()), {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trainable_blocks", [2, "all"])
def test_checkpointed_activations_give_the_same_gradients_from_less_memory(
    family: str, trainable_blocks: int | str
) -> None:
    options = {"layer": -1, "trainable_blocks": trainable_blocks}
    plain_bytes, plain = saved_bytes(family_vit(family, DROPS, **options).train())
    fewer_bytes, checkpointed = saved_bytes(family_vit(family, DROPS, checkpoint_activations=True, **options).train())
    assert plain.keys() == checkpointed.keys() and len(plain) > 10
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-7, msg=name)
    assert fewer_bytes < 0.35 * plain_bytes


@pytest.mark.parametrize("trainable_blocks", [1, "all"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_trains_must_be_float32(dtype: str, trainable_blocks: int | str) -> None:
    with pytest.raises(ConfigError, match=rf"trainable vision encoder in {dtype}.*float32 masters"):
        tiny_vit(dtype=dtype, trainable_blocks=trainable_blocks)


@pytest.mark.parametrize(
    ("trainable_blocks", "message"),
    [
        (3, "trainable_blocks is 3, but only 2 blocks are kept"),
        (-1, "trainable_blocks is -1"),
        ("last", "trainable_blocks is 'last'"),
        (True, "trainable_blocks is True"),
        (1.5, "trainable_blocks is 1.5"),
        (None, "trainable_blocks is None"),
    ],
)
def test_a_number_of_blocks_that_makes_no_sense_is_refused(trainable_blocks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_vit(trainable_blocks=trainable_blocks)


def test_checkpointing_a_frozen_encoder_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    encoder = tiny_vit(checkpoint_activations=True)
    assert "does nothing for a frozen vision encoder" in caplog.text
    assert not encoder.backbone.grad_checkpointing


def test_a_trained_encoder_computes_in_bfloat16_under_autocast_with_float32_gradients() -> None:
    encoder = tiny_vit(trainable_blocks="all").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = encoder(random_images(2))
    assert tokens.dtype == torch.float32
    tokens.square().mean().backward()
    assert {parameter.grad.dtype for parameter in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_frozen_half_precision_encoder_stays_bit_identical_while_stage_1_trains_under_autocast(dtype: str) -> None:
    model = tiny_stage1(vision={"dtype": dtype}).train()
    before = {name: parameter.detach().clone() for name, parameter in model.vision_encoder.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = model.image_tokens(random_images(2))
        hidden = model.encode_image(tokens).hidden
    assert tokens.isfinite().all() and hidden.isfinite().all()
    hidden.float().square().mean().backward()
    optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in model.vision_encoder.named_parameters())
    assert not [name for name, p in model.vision_encoder.named_parameters() if p.grad is not None]


def test_stage_2_trains_the_last_blocks_through_the_language_model() -> None:
    model = tiny_stage2(DecoderOnly(OPT), vision={"trainable_blocks": 1}).train()
    model(stage2_batch([2, 2, 2], [3, 2, 4])).logits.square().mean().backward()
    reached = {name for name, p in model.vision_encoder.backbone.named_parameters() if p.grad is not None}
    assert {".".join(name.split(".")[:2]) for name in reached} == {"blocks.1"}
    assert model.vision_encoder.backbone.blocks[1].training and not model.vision_encoder.backbone.blocks[0].training


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.5])
def test_ln_vision_uses_the_stated_epsilon(eps: float) -> None:
    for model in (tiny_stage1(ln_vision_eps=eps), tiny_stage2(DecoderOnly(OPT), ln_vision_eps=eps)):
        raw = model.vision_encoder(random_images(1))
        centred = raw - raw.mean(-1, keepdim=True)
        expected = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        torch.testing.assert_close(model.ln_vision(raw), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(tiny_stage1(ln_vision=False, ln_vision_eps=eps).ln_vision, nn.Identity)
