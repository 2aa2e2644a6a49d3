"""What every language-model adapter must do, for every family on tiny models of its real class.

transformers' own forward, loss and generate decide, on one row without padding; so does a loop over single tokens.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_model import (
    GEMMA,
    GPT_NEOX,
    LLAMA,
    MISTRAL,
    OPT,
    OPT_PROJECTED,
    QWEN2,
    QWEN3,
    T5,
    T5_TIED,
    stage2_batch,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from blip2train.batch import IGNORE_INDEX, Sample, Stage2Batch
from blip2train.data.collate import Stage2Collator
from blip2train.data.tokenizer import LanguageModelTokenizer
from blip2train.errors import ConfigError
from blip2train.model.language_model.base import GenerationSettings
from blip2train.model.language_model.decoder_only import DecoderOnly
from blip2train.model.language_model.encoder_decoder import EncoderDecoder

Adapter = DecoderOnly | EncoderDecoder
BUILD = {
    "opt": (DecoderOnly, OPT),
    "opt with projected embeddings": (DecoderOnly, OPT_PROJECTED),
    "llama": (DecoderOnly, LLAMA),
    "qwen2": (DecoderOnly, QWEN2),
    "qwen3": (DecoderOnly, QWEN3),
    "mistral, window 5": (DecoderOnly, MISTRAL),
    "gpt-neox": (DecoderOnly, GPT_NEOX),
    "gemma": (DecoderOnly, GEMMA),  # no yaml of ours: any causal model goes through the same adapter
    "t5 v1.1": (EncoderDecoder, T5),
    "t5 tied": (EncoderDecoder, T5_TIED),
}
DECODER_ONLY = [kind for kind, (adapter, _) in BUILD.items() if adapter is DecoderOnly]
DROPOUT = {
    "opt": {"dropout": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5},
    "t5": {"dropout_rate": 0.5},
}
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


def visual_prompt(adapter: Adapter) -> Tensor:
    return torch.randn(3, 4, adapter.embed_dim, generator=torch.Generator().manual_seed(8))


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


def logits_of_a_loop(adapter: Adapter, visual: Tensor, row: Stage2Batch) -> Tensor:
    """Logits (Tt, V) from one forward per target, each seeing exactly what comes before it."""
    model, embed = adapter.model, adapter.model.get_input_embeddings()
    prefix, rows = torch.cat([visual, embed(row.prompt_ids)], dim=1), []
    for seen in range(row.target_ids.shape[1]):
        before = row.target_ids[:, :seen]
        if isinstance(adapter, EncoderDecoder):
            start = torch.full((1, 1), model.config.decoder_start_token_id)
            output = model(inputs_embeds=prefix, decoder_input_ids=torch.cat([start, before], dim=1), use_cache=False)
        else:
            output = model(inputs_embeds=torch.cat([prefix, embed(before)], dim=1), use_cache=False)
        rows.append(output.logits[0, -1])
    return torch.stack(rows)


def test_each_target_is_predicted_from_what_precedes_it(adapter: Adapter) -> None:
    batch, visual = stage2_batch([4, 0, 2], TARGETS), visual_prompt(adapter)
    output = adapter(visual, batch)
    for row, length in enumerate(TARGETS):
        expected = logits_of_a_loop(adapter, visual[row : row + 1], one_row(batch, row))
        torch.testing.assert_close(output.logits[row, :length], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_and_targets_are_those_of_transformers_without_padding(
    adapter: Adapter, prompts: list[int], side: str
) -> None:
    batch, visual = stage2_batch(prompts, TARGETS), visual_prompt(adapter)
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
    batch, visual = stage2_batch([2, 2, 2], TARGETS), visual_prompt(adapter)
    changed = visual.clone()
    changed[1, 0] += 1
    before, after = adapter(visual, batch).logits, adapter(changed, batch).logits
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert (before[1, :3] != after[1, :3]).any(dim=-1).all()


def test_gradients_reach_the_visual_prompt_and_no_weight(adapter: Adapter) -> None:
    visual = visual_prompt(adapter).requires_grad_()
    output = adapter.train()(visual, stage2_batch([4, 0, 2], TARGETS))
    F.cross_entropy(output.logits.flatten(0, 1), output.targets.flatten()).backward()
    assert visual.grad is not None
    assert visual.grad.abs().amax(dim=-1).gt(0).all()
    assert all(parameter.grad is None for parameter in adapter.parameters())


def test_an_optimizer_over_everything_moves_the_visual_prompt_alone(adapter: Adapter) -> None:
    visual = torch.nn.Parameter(visual_prompt(adapter))
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    optimizer = torch.optim.AdamW([visual, *adapter.train().parameters()], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = adapter(visual, stage2_batch([2, 2, 2], TARGETS))
        F.cross_entropy(output.logits.flatten(0, 1), output.targets.flatten()).backward()
        optimizer.step()
    assert not torch.equal(visual, visual_prompt(adapter))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())


@pytest.mark.parametrize("kind", BUILD)
def test_dropout_is_off_in_training_unless_it_is_asked_for(kind: str) -> None:
    build_class, config = BUILD[kind]
    config = config | DROPOUT.get(config["model_type"], {"attention_dropout": 0.5})
    batch = stage2_batch([2, 2, 2], TARGETS)

    def repeats(adapter: Adapter) -> bool:
        visual = visual_prompt(adapter)
        return torch.equal(adapter(visual, batch).logits, adapter(visual, batch).logits)

    frozen, lavis = build_class(config), build_class(config, dropout=True)
    assert repeats(frozen.train()) and not any(module.training for module in frozen.modules())
    assert not repeats(lavis), "as built, before anybody calls train()"
    assert repeats(lavis.eval())
    assert not repeats(lavis.train())
    assert not any(parameter.requires_grad for parameter in lavis.parameters())


@pytest.mark.parametrize("num_beams", [1, 5])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_generating_in_a_batch_equals_one_by_one(adapter: Adapter, num_beams: int, prompts: list[int]) -> None:
    batch, visual = stage2_batch(prompts, TARGETS), visual_prompt(adapter)
    settings = GenerationSettings(max_new_tokens=6, num_beams=num_beams, length_penalty=-1.0)
    together = adapter.generate(visual, batch.prompt_ids, batch.prompt_mask, settings)
    for row in range(3):
        alone = one_row(batch, row)
        single = adapter.generate(visual[row : row + 1], alone.prompt_ids, alone.prompt_mask, settings)[0]
        assert torch.equal(together[row, : len(single)], single)


@pytest.mark.parametrize("num_beams", [1, 5])
def test_generating_in_a_ragged_batch_is_transformers_on_each_row_alone(adapter: Adapter, num_beams: int) -> None:
    batch, visual = stage2_batch([4, 0, 2], TARGETS), visual_prompt(adapter)
    settings = GenerationSettings(max_new_tokens=6, num_beams=num_beams, length_penalty=-1.0)
    answers = adapter.generate(visual, batch.prompt_ids, batch.prompt_mask, settings)
    config = GenerationConfig(
        max_new_tokens=6, num_beams=num_beams, length_penalty=-1.0, eos_token_id=2,
        pad_token_id=adapter.model.config.pad_token_id, decoder_start_token_id=0,
    )  # fmt: skip
    for row in range(3):
        prompt = adapter.model.get_input_embeddings()(one_row(batch, row).prompt_ids)
        embeddings = torch.cat([visual[row : row + 1], prompt], dim=1)
        expected = adapter.model.generate(inputs_embeds=embeddings, generation_config=config)[0]
        new = expected[1:] if isinstance(adapter, EncoderDecoder) else expected
        assert torch.equal(answers[row, : len(new)], new)


@pytest.mark.parametrize("kind", DECODER_ONLY)
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
    batch, visual = stage2_batch([4, 0, 2], TARGETS), visual_prompt(adapter)
    answer = adapter.generate(visual, batch.prompt_ids, batch.prompt_mask, replace(GREEDY, end_id=59))
    forced = replace(batch, target_ids=answer, target_mask=torch.ones_like(answer, dtype=torch.bool))
    written = (answer == 59).cumsum(dim=1) == 0
    assert written.sum() > 6
    assert torch.equal(adapter(visual, forced).logits.argmax(dim=-1)[written], answer[written])


def test_an_answer_ends_at_the_given_end_token(adapter: Adapter) -> None:
    batch, visual = stage2_batch([4, 4, 4], TARGETS), visual_prompt(adapter)
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


@pytest.mark.parametrize("kind", BUILD)
def test_half_precision_weights_give_float32_logits_with_and_without_autocast(kind: str) -> None:
    build_class, config = BUILD[kind]
    adapter, batch = build_class(config, dtype="bfloat16"), stage2_batch([2, 2, 2], TARGETS)
    visual = visual_prompt(adapter)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.bfloat16}
    plain = adapter(visual, batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = adapter(visual, batch).logits
    assert plain.dtype == torch.float32
    assert torch.equal(plain, under_autocast)


def test_an_encoder_decoder_model_in_float16_is_refused() -> None:
    with pytest.raises(ConfigError, match="overflow in float16"):
        EncoderDecoder(T5, dtype="float16")


def collated(adapter: Adapter, captions: list[str], max_tokens: int) -> Stage2Batch:
    """Captions of one-letter words through the real tokenizer and collator; "</s>" is the adapter's end token, 2."""
    words = ["<pad>", "<unk>", "</s>", "<s>", *"abcdefgh"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    start = {} if isinstance(adapter, EncoderDecoder) else {"bos_token": "<s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", **start)
    collate = Stage2Collator(LanguageModelTokenizer(fast), max_tokens, prefix_split=isinstance(adapter, EncoderDecoder))
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    return collate([Sample(str(row), "set", image, caption, row) for row, caption in enumerate(captions)])


def test_the_end_token_of_a_caption_that_is_cut_is_still_learnt(adapter: Adapter) -> None:
    batch = collated(adapter, ["a b c d e f g h a b c d", "a b", "c"], max_tokens=4)
    output = adapter(visual_prompt(adapter), batch)
    for row, mask in enumerate(batch.target_mask):
        learnt = output.targets[row][output.targets[row] != IGNORE_INDEX]
        assert torch.equal(learnt, batch.target_ids[row][mask])
        assert len(learnt) <= 4 and learnt[-1] == 2 and not (learnt[:-1] == 2).any()
    assert len(batch.target_ids[0]) == 4, "the first caption was cut"


def test_a_model_without_an_end_token_needs_one_in_the_settings() -> None:
    adapter, batch = build("opt", eos_token_id=None), stage2_batch([2, 2, 2], TARGETS)
    with pytest.raises(ConfigError, match="names no end token"):
        adapter.generate(None, batch.prompt_ids, batch.prompt_mask, GREEDY)
    assert len(adapter.generate(None, batch.prompt_ids, batch.prompt_mask, replace(GREEDY, end_id=2))) == 3
