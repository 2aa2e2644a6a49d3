"""Stage 1 and stage 2 as wholes: what is frozen stays frozen, shapes and norms hold, one image is enough."""

import pytest
import torch
import torch.nn.functional as F
from tiny_model import (
    OPT,
    T5,
    random_images,
    random_text,
    stage2_batch,
    tiny_qformer,
    tiny_stage1,
    tiny_stage2,
    tiny_vit,
)
from torch import Tensor, nn

from blip2train.batch import IGNORE_INDEX
from blip2train.errors import ConfigError
from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.freezing import count_parameters, freeze, trainable_state_dict
from blip2train.model.language_model.base import GenerationSettings
from blip2train.model.language_model.decoder_only import DecoderOnly
from blip2train.model.language_model.encoder_decoder import EncoderDecoder

IDS, MASK = random_text([6, 4, 1])


def frozen_copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}


def stage1_loss(model: Blip2Stage1) -> Tensor:
    """A loss through every verb; stands for the three objectives."""
    tokens = model.image_tokens(random_images(3))
    query = model.encode_image(tokens)
    similarity = model.image_features(query.hidden).mean(1) @ model.text_features(IDS, MASK).T / model.temperature
    matching = model.matching_logits(tokens, IDS, MASK)
    generation = model.generation_logits(IDS, MASK, query)
    return similarity.square().mean() + matching.square().mean() + generation[MASK].square().mean()


def test_a_training_step_reaches_every_trainable_parameter_and_moves_no_frozen_bit() -> None:
    model = tiny_stage1().train()
    before = frozen_copy(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        stage1_loss(model).backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
    after = frozen_copy(model)
    assert before.keys() == after.keys() == {n for n, _ in model.named_parameters() if n.startswith("vision_encoder")}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_frozen_encoder_builds_no_graph_and_stays_in_eval_mode() -> None:
    model = tiny_stage1().train()
    assert model.qformer.training
    assert not any(module.training for module in model.vision_encoder.modules())
    assert not model.vision_encoder(random_images(1)).requires_grad
    tokens = model.image_tokens(random_images(1))
    assert tokens.grad_fn.next_functions[0][0] is None, "behind ln_vision there is no graph"
    from_leaf = model.image_tokens(random_images(1).float().requires_grad_())
    assert from_leaf.grad_fn.next_functions[0][0] is None, "not even where the pixels ask for one"
    assert not model.eval().train(False).qformer.training


def test_an_encoder_that_is_to_train_gets_gradients() -> None:
    model = tiny_stage1(vision={"trainable_blocks": "all"}).train()
    assert model.vision_encoder.training
    stage1_loss(model).backward()
    assert all(p.grad is not None for p in model.vision_encoder.parameters())


def test_each_image_is_projected_once_for_all_three_losses() -> None:
    model, calls = tiny_stage1().eval(), []
    for block in model.qformer.blocks:
        if block.cross_attention is not None:
            block.cross_attention.key.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    query = model.encode_image(model.image_tokens(random_images(3)))
    model.matching_logits(query.image, IDS.repeat(3, 1), MASK.repeat(3, 1), torch.tensor([0, 1, 2, 1, 2, 0, 0, 1, 2]))
    model.generation_logits(IDS, MASK, query)
    assert calls == [3, 3], "two layers with cross-attention, three images each"


def test_features_are_unit_vectors_of_the_contrastive_width() -> None:
    model = tiny_stage1().eval()
    image_features = model.image_features(model.encode_image(model.image_tokens(random_images(3))).hidden)
    text_features = model.text_features(IDS, MASK)
    assert (image_features.shape, text_features.shape) == ((3, 5, 16), (3, 16))
    for features in (image_features, text_features):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(features.shape[:-1]))


def test_matching_logits_are_the_mean_over_queries_of_the_head() -> None:
    model = tiny_stage1().eval()
    tokens = model.image_tokens(random_images(3))
    per_query = torch.stack([model.itm_head(state) for state in model.qformer.fuse(tokens, IDS, MASK).unbind(1)])
    torch.testing.assert_close(model.matching_logits(tokens, IDS, MASK), per_query.mean(0))


def test_ln_vision_can_be_left_out() -> None:
    with_norm, without = tiny_stage1(), tiny_stage1(ln_vision=False)
    assert count_parameters(with_norm)[0] - count_parameters(without)[0] == 2 * 24
    assert torch.equal(without.image_tokens(random_images(1)), without.vision_encoder(random_images(1)))
    expected = F.layer_norm(without.image_tokens(random_images(1)), (24,), eps=1e-5)
    torch.testing.assert_close(with_norm.image_tokens(random_images(1)), expected)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_batch_of_one_runs_in_float32_and_in_bfloat16(precision: torch.dtype | None) -> None:
    model = tiny_stage1().train()
    ids, mask = random_text([3])
    with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
        tokens = model.image_tokens(random_images(1))
        query = model.encode_image(tokens)
        outputs = [
            model.image_features(query.hidden),
            model.text_features(ids, mask),
            model.matching_logits(tokens, ids, mask),
            model.generation_logits(ids, mask, query),
        ]
    assert tokens.dtype == (precision or torch.float32)
    sum(output.float().sum() for output in outputs).backward()
    assert all(output.isfinite().all() for output in outputs)


def test_models_run_after_a_cast_to_bfloat16_as_a_whole() -> None:
    model = tiny_stage1().bfloat16()
    loss = stage1_loss(model)  # heads and what follows them stay float32
    assert loss.dtype == torch.float32 and loss.isfinite()
    stage2 = tiny_stage2(DecoderOnly(OPT)).bfloat16()
    assert stage2(stage2_batch([0, 0, 0], [3, 2, 4])).logits.isfinite().all()


def test_stage2_trains_query_path_and_projection_only() -> None:
    for language_model in (DecoderOnly(OPT), EncoderDecoder(T5)):
        model = tiny_stage2(language_model).train()
        before = frozen_copy(model)
        output = model(stage2_batch([2, 2, 2], [3, 2, 4]))
        F.cross_entropy(output.logits.flatten(0, 1), output.targets.flatten(), ignore_index=IGNORE_INDEX).backward()
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name.split(".")[0] for name in trainable} == {"ln_vision", "qformer", "projection"}
        assert not [name for name in trainable if "text" in name or "lm_head" in name]
        assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        assert all(torch.equal(before[name], tensor) for name, tensor in frozen_copy(model).items())
        frozen_parts = (model.vision_encoder, model.language_model)
        assert not any(module.training for part in frozen_parts for module in part.modules())


def test_stage2_answers_depend_on_the_image_and_work_without_one() -> None:
    torch.manual_seed(0)
    model = tiny_stage2(DecoderOnly(OPT)).eval()
    batch, settings = stage2_batch([2, 2, 2], [3, 2, 4]), GenerationSettings(max_new_tokens=4)
    prompt = model.visual_prompt(batch.pixel_values)
    assert prompt.shape == (3, 5, 32)
    seeing = model.generate(batch.pixel_values, batch.prompt_ids, batch.prompt_mask, settings)
    direct = model.language_model.generate(prompt, batch.prompt_ids, batch.prompt_mask, settings)
    assert torch.equal(seeing, direct)
    blind = model.generate(None, batch.prompt_ids, batch.prompt_mask, settings)
    assert torch.equal(blind, model.language_model.generate(None, batch.prompt_ids, batch.prompt_mask, settings))
    other = model(stage2_batch([2, 2, 2], [3, 2, 4])).logits
    batch.pixel_values = 255 - batch.pixel_values
    assert not torch.equal(model(batch).logits, other)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_qformer_for_another_encoder_is_refused_with_both_widths(stage: int) -> None:
    qformer = tiny_qformer(image_dim=30)
    with pytest.raises(ConfigError, match=r"24 wide.*built for 30"):
        Blip2Stage1(tiny_vit(), qformer) if stage == 1 else Blip2Stage2(tiny_vit(), qformer, DecoderOnly(OPT))


def test_trainable_state_dict_holds_what_trains_and_nothing_else() -> None:
    model = nn.ModuleDict({"frozen": nn.Linear(3, 4), "trained": nn.Linear(4, 2)})
    freeze(model["frozen"])
    assert set(trainable_state_dict(model)) == {"trained.weight", "trained.bias"}
    assert not any(tensor.requires_grad for tensor in trainable_state_dict(model).values())
    assert count_parameters(model) == (10, 16)
    assert not model["frozen"].training
