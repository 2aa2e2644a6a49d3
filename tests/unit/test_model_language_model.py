"""What every language-model adapter must do, on OPT, LLaMA and T5; transformers' own forward and generate decide."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_model import LLAMA, OPT, T5, stage2_batch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from blip2train.batch import IGNORE_INDEX, Stage2Batch
from blip2train.errors import CheckpointError, ConfigError
from blip2train.model.language_model.base import GenerationSettings
from blip2train.model.language_model.decoder_only import DecoderOnly
from blip2train.model.language_model.encoder_decoder import EncoderDecoder

Adapter = DecoderOnly | EncoderDecoder
BUILD = {"opt": (DecoderOnly, OPT), "llama": (DecoderOnly, LLAMA), "t5": (EncoderDecoder, T5)}
PROMPTS = {"no prompt": [0, 0, 0], "same prompts": [4, 4, 4], "ragged prompts": [4, 0, 2]}
TARGETS = [5, 3, 4]
GREEDY = GenerationSettings(max_new_tokens=6)


def build(kind: str, **changes: Any) -> Adapter:
    torch.manual_seed(4)
    adapter, config = BUILD[kind]
    return adapter(config | changes)


@pytest.fixture(params=BUILD)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return build(request.param)


def visual_prompt(rows: int = 3) -> Tensor:
    return torch.randn(rows, 4, 32, generator=torch.Generator().manual_seed(8))


def pad_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's padding to the front, row by row."""
    rows = [torch.cat([i[~m], i[m]]) for i, m in zip(ids, mask, strict=True)]
    return torch.stack(rows), mask.flip(1)


def one_row(batch: Stage2Batch, row: int) -> Stage2Batch:
    """A row without any padding."""
    prompt, target = batch.prompt_ids[row][batch.prompt_mask[row]], batch.target_ids[row][batch.target_mask[row]]
    ones = [torch.ones(1, len(ids), dtype=torch.bool) for ids in (prompt, target)]
    return Stage2Batch(batch.pixel_values[:1], prompt[None], ones[0], target[None], ones[1], keys=["row"])


def transformers_logits(adapter: Adapter, visual: Tensor | None, row: Stage2Batch) -> tuple[Tensor, Tensor]:
    """Logits (Tt, V) and the loss of transformers' own forward with labels, on one row without padding."""
    model, embed = adapter.model, adapter.model.get_input_embeddings()
    prefix = embed(row.prompt_ids) if visual is None else torch.cat([visual, embed(row.prompt_ids)], dim=1)
    if isinstance(adapter, EncoderDecoder):
        output = model(inputs_embeds=prefix, labels=row.target_ids)
        return output.logits[0], output.loss
    ignored = torch.full((1, prefix.shape[1]), IGNORE_INDEX)
    inputs = torch.cat([prefix, embed(row.target_ids)], dim=1)
    output = model(inputs_embeds=inputs, labels=torch.cat([ignored, row.target_ids], dim=1))
    return output.logits[0, prefix.shape[1] - 1 : -1], output.loss


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_and_targets_are_those_of_transformers_without_padding(
    adapter: Adapter, prompts: list[int], side: str
) -> None:
    batch, visual = stage2_batch(prompts, TARGETS), visual_prompt()
    padded = batch
    if side == "left":
        prompt_ids, prompt_mask = pad_left(batch.prompt_ids, batch.prompt_mask)
        padded = replace(batch, prompt_ids=prompt_ids, prompt_mask=prompt_mask)
    output = adapter(visual, padded)
    total = torch.tensor(0.0)
    for row, length in enumerate(TARGETS):
        alone = one_row(batch, row)
        logits, loss = transformers_logits(adapter, visual[row : row + 1], alone)
        torch.testing.assert_close(output.logits[row, :length], logits, rtol=0, atol=2e-5)
        assert torch.equal(output.targets[row, :length], alone.target_ids[0])
        assert output.targets[row, length - 1] == 2, "the end token is a target"
        assert (output.targets[row, length:] == IGNORE_INDEX).all()
        total += loss * length
    ours = F.cross_entropy(output.logits.flatten(0, 1), output.targets.flatten(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(ours, total / sum(TARGETS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prompts", [[4, 1, 2], [4, 4, 4]])
def test_without_an_image_the_text_alone_is_modelled(adapter: Adapter, prompts: list[int]) -> None:
    batch = stage2_batch(prompts, TARGETS)
    output = adapter(None, batch)
    for row, length in enumerate(TARGETS):
        logits, _ = transformers_logits(adapter, None, one_row(batch, row))
        torch.testing.assert_close(output.logits[row, :length], logits, rtol=0, atol=2e-5)


def test_a_first_target_that_nothing_precedes_is_ignored() -> None:
    batch = stage2_batch([2, 0, 0], TARGETS)
    adapter = build("opt")
    output = adapter(None, batch)
    assert (output.targets[:, 0] == IGNORE_INDEX).tolist() == [False, True, True]
    whole = adapter.model(input_ids=batch.target_ids[1:2, :3]).logits[0]
    torch.testing.assert_close(output.logits[1, 1:3], whole[:2], rtol=0, atol=2e-5)


def test_the_visual_prompt_conditions_its_own_row_only(adapter: Adapter) -> None:
    batch, visual = stage2_batch([2, 2, 2], TARGETS), visual_prompt()
    changed = visual.clone()
    changed[1, 0] += 1
    before, after = adapter(visual, batch).logits, adapter(changed, batch).logits
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert (before[1, :3] != after[1, :3]).any(dim=-1).all()


def test_gradients_reach_the_visual_prompt_and_no_weight(adapter: Adapter) -> None:
    visual = visual_prompt().requires_grad_()
    output = adapter.train()(visual, stage2_batch([4, 0, 2], TARGETS))
    F.cross_entropy(output.logits.flatten(0, 1), output.targets.flatten()).backward()
    assert visual.grad is not None
    assert visual.grad.abs().amax(dim=-1).gt(0).all()
    assert all(parameter.grad is None for parameter in adapter.parameters())


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [("opt", {"dropout": 0.5}), ("llama", {"attention_dropout": 0.5}), ("t5", {"dropout_rate": 0.5})],
)
def test_dropout_stays_off_in_training(kind: str, dropout: dict[str, float]) -> None:
    adapter, batch = build(kind, **dropout).train(), stage2_batch([2, 2, 2], TARGETS)
    assert torch.equal(adapter(visual_prompt(), batch).logits, adapter(visual_prompt(), batch).logits)
    assert not any(module.training for module in adapter.modules())


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_generating_in_a_batch_equals_one_by_one(adapter: Adapter, num_beams: int, prompts: list[int]) -> None:
    batch, visual = stage2_batch(prompts, TARGETS), visual_prompt()
    settings = GenerationSettings(max_new_tokens=6, num_beams=num_beams, length_penalty=-1.0)
    together = adapter.generate(visual, batch.prompt_ids, batch.prompt_mask, settings)
    for row in range(3):
        alone = one_row(batch, row)
        single = adapter.generate(visual[row : row + 1], alone.prompt_ids, alone.prompt_mask, settings)[0]
        assert torch.equal(together[row, : len(single)], single)


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_generation_from_text_alone_is_transformers_greedy_search(kind: str) -> None:
    adapter, batch = build(kind), stage2_batch([4, 4, 4], TARGETS)
    expected = adapter.model.generate(
        input_ids=batch.prompt_ids,
        attention_mask=batch.prompt_mask.long(),
        generation_config=GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=1),
    )
    assert torch.equal(adapter.generate(None, batch.prompt_ids, batch.prompt_mask, GREEDY), expected[:, 4:])


def test_generation_follows_the_forward_pass(adapter: Adapter) -> None:
    """Greedy answers are the arg-max of the teacher-forced logits on themselves."""
    batch, visual = stage2_batch([4, 0, 2], TARGETS), visual_prompt()
    answer = adapter.generate(visual, batch.prompt_ids, batch.prompt_mask, replace(GREEDY, end_id=59))
    forced = replace(batch, target_ids=answer, target_mask=torch.ones_like(answer, dtype=torch.bool))
    assert torch.equal(adapter(visual, forced).logits.argmax(dim=-1)[answer != 59], answer[answer != 59])


def test_an_answer_ends_at_the_given_end_token(adapter: Adapter) -> None:
    batch, visual = stage2_batch([4, 4, 4], TARGETS), visual_prompt()
    free = adapter.generate(visual, batch.prompt_ids, batch.prompt_mask, replace(GREEDY, end_id=59))
    end_id = int(free[0, 1])
    ended = adapter.generate(visual, batch.prompt_ids, batch.prompt_mask, replace(GREEDY, end_id=end_id))
    first_end = int((ended[0] == end_id).int().argmax())
    assert torch.equal(ended[0, : first_end + 1], free[0, : first_end + 1])
    assert (ended[0, first_end + 1 :] == adapter.model.config.pad_token_id).all()


def test_generation_without_anything_to_start_from_is_refused(adapter: Adapter) -> None:
    batch = stage2_batch([2, 0, 0], TARGETS)
    with pytest.raises(ConfigError, match="no image and an empty prompt"):
        adapter.generate(None, batch.prompt_ids, batch.prompt_mask, GREEDY)


def test_a_saved_model_loads_and_its_generation_defaults_are_not_used(tmp_path: Path) -> None:
    adapter, batch, visual = build("opt"), stage2_batch([2, 2, 2], TARGETS), visual_prompt()
    adapter.model.generation_config = GenerationConfig(do_sample=True, temperature=9.0, num_beams=4, max_length=3)
    adapter.model.save_pretrained(tmp_path)
    loaded = DecoderOnly(str(tmp_path))
    assert torch.equal(loaded(visual, batch).logits, adapter(visual, batch).logits)
    answers = [m.generate(visual, batch.prompt_ids, batch.prompt_mask, GREEDY) for m in (build("opt"), loaded)]
    assert torch.equal(*answers)
    random = DecoderOnly(tmp_path, weights=False)
    assert not torch.equal(random(visual, batch).logits, adapter(visual, batch).logits)


def test_half_precision_weights_give_float32_logits_with_and_without_autocast() -> None:
    adapter, batch = DecoderOnly(OPT, dtype="bfloat16"), stage2_batch([2, 2, 2], TARGETS)
    plain = adapter(visual_prompt(), batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = adapter(visual_prompt(), batch).logits
    assert plain.dtype == torch.float32
    assert torch.equal(plain, under_autocast)


def test_overrides_change_single_fields_of_the_config() -> None:
    assert AutoConfig.for_model(**T5).dense_act_fn == "gelu_new"
    assert EncoderDecoder(T5, overrides={"dense_act_fn": "gelu"}).model.config.dense_act_fn == "gelu"


def test_weights_that_leave_parts_out_are_refused(tmp_path: Path) -> None:
    adapter = build("llama")
    kept = {name: tensor for name, tensor in adapter.model.state_dict().items() if "layers.1" not in name}
    adapter.model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(CheckpointError, match=r"lack 9 tensors.*layers\.1"):
        DecoderOnly(tmp_path)


@pytest.mark.parametrize(
    ("adapter", "source", "options", "message"),
    [
        (DecoderOnly, "no/such/folder", {}, "no language model from 'no/such/folder'"),
        (DecoderOnly, {"model_type": "nothing"}, {}, "no language model from"),
        (DecoderOnly, T5, {}, "t5 cannot be built by AutoModelForCausalLM"),
        (EncoderDecoder, OPT, {}, "opt cannot be built by AutoModelForSeq2SeqLM"),
        (DecoderOnly, OPT, {"dtype": "half"}, "unknown dtype 'half'"),
        (DecoderOnly, OPT, {"overrides": {"dropuot": 0.0}}, "opt has no setting 'dropuot'"),
        (EncoderDecoder, T5, {"dtype": "float16"}, "overflow in float16"),
    ],
)
def test_what_cannot_be_built_is_refused(adapter: type, source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapter(source, **options)


def test_a_model_without_an_end_token_needs_one_in_the_settings() -> None:
    adapter, batch = build("opt", eos_token_id=None), stage2_batch([2, 2, 2], TARGETS)
    with pytest.raises(ConfigError, match="names no end token"):
        adapter.generate(None, batch.prompt_ids, batch.prompt_mask, GREEDY)
    assert len(adapter.generate(None, batch.prompt_ids, batch.prompt_mask, replace(GREEDY, end_id=2))) == 3
