"""Batches from samples, checked against tokens written out by hand."""

import json
from pathlib import Path

import pytest
import torch
from tiny_model import OPT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blip2train.batch import Sample
from blip2train.data.collate import Stage1Collator, Stage2Collator
from blip2train.data.tokenizer import LanguageModelTokenizer, QFormerTokenizer
from blip2train.errors import ConfigError
from blip2train.model.language_model.decoder_only import DecoderOnly
from blip2train.objective.language_modeling import LanguageModelingObjective

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "dog", "and", "cat", "photo", "of", "<s>", "</s>"]
PAD, CLS, SEP, _, A, DOG, AND, CAT, PHOTO, OF, START, END = range(12)


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", **special)


@pytest.fixture(scope="module")
def qformer() -> QFormerTokenizer:
    return QFormerTokenizer(word_tokenizer(cls_token="[CLS]", sep_token="[SEP]"))


@pytest.fixture(scope="module")
def decoder_only() -> LanguageModelTokenizer:
    return LanguageModelTokenizer(word_tokenizer(bos_token="<s>", eos_token="</s>"))


@pytest.fixture(scope="module")
def encoder_decoder() -> LanguageModelTokenizer:
    return LanguageModelTokenizer(word_tokenizer(eos_token="</s>"))


def sample(caption: str, key: str = "k", level: int = 0, image_id: int = 0) -> Sample:
    return Sample(key, "set", torch.full((3, 16, 16), level, dtype=torch.uint8), caption, image_id)


def test_stage1_batch_holds_cleaned_padded_captions(qformer: QFormerTokenizer) -> None:
    samples = [sample("A DOG!", "x", 3, 10), sample("a dog and a cat", "y", 4, 11)]
    batch = Stage1Collator(qformer)(samples)
    assert batch.input_ids.tolist() == [[CLS, A, DOG, SEP, PAD, PAD, PAD], [CLS, A, DOG, AND, A, CAT, SEP]]
    assert batch.attention_mask.tolist() == [[True] * 4 + [False] * 3, [True] * 7]
    assert batch.image_ids.tolist() == [10, 11]
    assert batch.keys == ["x", "y"]
    assert batch.pixel_values.dtype == torch.uint8
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [3, 4]


def test_stage1_truncates_to_max_tokens_and_can_leave_captions_raw(qformer: QFormerTokenizer) -> None:
    batch = Stage1Collator(qformer, max_tokens=4, clean=False)([sample("a dog and a cat"), sample("A")])
    assert batch.input_ids.tolist() == [[CLS, A, DOG, SEP], [CLS, qformer._tokenizer.unk_token_id, SEP, PAD]]


def test_stage2_of_a_decoder_starts_the_prompt_and_ends_the_target(decoder_only: LanguageModelTokenizer) -> None:
    batch = Stage2Collator(decoder_only, prompt="a photo of ")([sample("a dog"), sample("dog and cat")])
    assert batch.prompt_ids.tolist() == [[START, A, PHOTO, OF]] * 2
    assert batch.target_ids.tolist() == [[A, DOG, END, PAD], [DOG, AND, CAT, END]]
    assert batch.target_mask.tolist() == [[True, True, True, False], [True] * 4]


def test_stage2_without_a_prompt_keeps_only_the_start_token(
    decoder_only: LanguageModelTokenizer, encoder_decoder: LanguageModelTokenizer
) -> None:
    assert Stage2Collator(decoder_only)([sample("a dog")]).prompt_ids.tolist() == [[START]]
    assert Stage2Collator(encoder_decoder)([sample("a dog")]).prompt_ids.shape == (1, 0)


def test_the_start_token_of_an_unprompted_caption_is_a_target_when_asked_to(
    decoder_only: LanguageModelTokenizer, encoder_decoder: LanguageModelTokenizer
) -> None:
    batch = Stage2Collator(decoder_only, predict_start=True, max_tokens=4)([sample("a dog and a cat"), sample("dog")])
    assert batch.prompt_ids.shape == (2, 0)
    assert batch.target_ids.tolist() == [[START, A, DOG, END], [START, DOG, END, PAD]]
    for settings in ({"prompt": "a photo of"}, {"prefix_split": True}):
        with pytest.raises(ConfigError, match="no start token to predict"):
            Stage2Collator(decoder_only, predict_start=True, **settings)
    with pytest.raises(ConfigError, match="start token id None"):
        Stage2Collator(encoder_decoder, predict_start=True)


def test_with_the_start_token_as_target_the_loss_is_that_of_transformers_over_every_token(
    decoder_only: LanguageModelTokenizer,
) -> None:
    """The oracle labels as LAVIS does: nothing under the visual prompt, every real token of the caption after it."""
    torch.manual_seed(0)
    language_model = DecoderOnly(OPT)
    batch = Stage2Collator(decoder_only, predict_start=True)([sample("a dog and a cat"), sample("a dog")])
    visual_B4L = torch.randn(2, 4, language_model.embed_dim)
    loss = LanguageModelingObjective()(language_model(visual_B4L, batch)).loss
    model = language_model.model
    labels = batch.target_ids.masked_fill(~batch.target_mask, -100)
    expected = model(
        inputs_embeds=torch.cat([visual_B4L, model.get_input_embeddings()(batch.target_ids)], dim=1),
        attention_mask=torch.cat([torch.ones(2, 4, dtype=torch.int64), batch.target_mask.long()], dim=1),
        labels=torch.cat([torch.full((2, 4), -100), labels], dim=1),
    ).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_prefix_split_cuts_between_the_first_word_and_the_middle(encoder_decoder: LanguageModelTokenizer) -> None:
    words = ["a", "dog", "and", "a", "cat"]
    seen = set()
    for seed in range(40):
        prompts, targets = Stage2Collator(encoder_decoder, prefix_split=True, seed=seed).split(
            [sample(" ".join(words))]
        )
        assert f"{prompts[0]} {targets[0]}".split() == words
        seen.add(len(prompts[0].split()))
    assert seen == {1, 2}


def test_a_one_word_caption_has_an_empty_prefix_and_the_prompt_stays(encoder_decoder: LanguageModelTokenizer) -> None:
    assert Stage2Collator(encoder_decoder, prefix_split=True).split([sample("dog")]) == ([""], ["dog"])
    batch = Stage2Collator(encoder_decoder, prefix_split=True, prompt="photo of")([sample("dog")])
    assert (batch.prompt_ids.tolist(), batch.target_ids.tolist()) == ([[PHOTO, OF]], [[DOG, END]])


def test_a_split_depends_on_its_own_sample_alone(encoder_decoder: LanguageModelTokenizer) -> None:
    samples = [sample("a dog and a cat and a dog", key) for key in "abcdefgh"]
    collator = Stage2Collator(encoder_decoder, prefix_split=True)
    together = collator.split(samples)
    state = torch.get_rng_state()
    alone = [collator.split([one]) for one in samples]
    assert [prompt for (prompt,), _ in alone] == together[0]
    assert len(set(together[0])) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_another_augmentation_gives_another_split(encoder_decoder: LanguageModelTokenizer) -> None:
    collator = Stage2Collator(encoder_decoder, prefix_split=True)
    splits = {collator.split([sample("a dog and a cat and a dog", level=level)])[0][0] for level in range(20)}
    assert len(splits) > 1


def test_a_word_after_a_prompt_is_spelled_as_inside_a_sentence(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tokenizers" / "gpt2_opt"
    (tmp_path / "vocab.json").write_bytes((source / "opt_vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((source / "opt_merges.txt").read_bytes())
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    opt = LanguageModelTokenizer.load(tmp_path, end_token="\n")
    batch = Stage2Collator(opt, prompt="a photo of ")([sample("a dog")])
    whole, _ = opt.encode(["a photo of a dog"], 32, add_start=True, add_end=True)
    assert torch.cat([batch.prompt_ids, batch.target_ids], dim=1).tolist() == whole.tolist()
