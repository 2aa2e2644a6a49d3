"""Batches from samples, checked against tokens written out by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_stage1 import fake_model
from tiny_model import OPT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blip2train.batch import Sample
from blip2train.data.collate import Stage1Collator, Stage2Collator
from blip2train.data.tokenizer import LanguageModelTokenizer, QFormerTokenizer
from blip2train.errors import ConfigError, DataError
from blip2train.model.language_model.decoder_only import DecoderOnly
from blip2train.objective.context import build_context
from blip2train.objective.language_modeling import LanguageModelingObjective
from blip2train.objective.matching import sample_hard_negatives

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


def sample(
    caption: str, key: str = "k", level: int = 0, image_id: int = 0, dataset: str = "set", epoch: int = 0
) -> Sample:
    return Sample(key, dataset, torch.full((3, 16, 16), level, dtype=torch.uint8), caption, image_id, epoch)


def test_stage1_batch_holds_cleaned_padded_captions(qformer: QFormerTokenizer) -> None:
    samples = [sample("A DOG!", "x", 3, 10), sample("a dog and a cat", "y", 4, 11)]
    batch = Stage1Collator(qformer)(samples)
    assert batch.input_ids.tolist() == [[CLS, A, DOG, SEP, PAD, PAD, PAD], [CLS, A, DOG, AND, A, CAT, SEP]]
    assert batch.attention_mask.tolist() == [[True] * 4 + [False] * 3, [True] * 7]
    assert batch.image_ids.dtype == torch.int64
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


def test_a_split_is_fresh_in_every_epoch_and_dataset_but_the_same_for_any_pixels(
    encoder_decoder: LanguageModelTokenizer,
) -> None:
    collator, caption = Stage2Collator(encoder_decoder, prefix_split=True), "a dog and a cat and a dog"
    epochs = [collator.split([sample(caption, epoch=epoch)])[0][0] for epoch in range(20)]
    datasets = [collator.split([sample(caption, dataset=str(number))])[0][0] for number in range(20)]
    assert len(set(epochs)) > 1 and len(set(datasets)) > 1
    assert {collator.split([sample(caption, level=level)])[0][0] for level in range(20)} == {epochs[0]}


def test_text_options_reach_both_collators(qformer: QFormerTokenizer, encoder_decoder: LanguageModelTokenizer) -> None:
    batch = Stage1Collator(qformer, max_words=2)([sample("A DOG and a cat")])
    assert batch.input_ids.tolist() == [[CLS, A, DOG, SEP]]
    assert Stage2Collator(encoder_decoder, max_words=2).split([sample("A DOG and a cat")])[1] == ["a dog"]
    raw = Stage2Collator(encoder_decoder, clean=False, max_words=None, unicode_form="NFC")
    assert raw.split([sample("A Cafe\u0301!  (blue)")])[1] == ["A Caf\xe9!  (blue)"]
    assert Stage2Collator(encoder_decoder, clean=False).split([sample("A Dog. " * 60)])[1] == [("A Dog. " * 25).strip()]


def test_equal_image_ids_are_one_image_within_a_dataset_and_across_only_when_shared(qformer: QFormerTokenizer) -> None:
    samples = [sample("a dog", image_id=285), sample("a cat", image_id=285), sample("a", image_id=286)]
    samples.append(sample("a dog", image_id=285, dataset="other"))
    first, again, other, elsewhere = Stage1Collator(qformer)(samples).image_ids.tolist()
    assert first == again and len({first, other, elsewhere}) == 3
    assert Stage1Collator(qformer, image_ids="shared")(samples).image_ids.tolist() == [285, 285, 286, 285]
    with pytest.raises(ConfigError, match="dataset, shared"):
        Stage1Collator(qformer, image_ids="mixed")


@pytest.mark.parametrize("world", ["one dataset", "shared", "two datasets"])
def test_two_captions_of_one_image_are_never_each_others_negatives(qformer: QFormerTokenizer, world: str) -> None:
    """From the samples to the drawn negatives: hard ones, where the image's other caption is by far the likeliest."""
    names = ["coco", "coco"] if world == "one dataset" else ["coco", "vqa"]
    pairs = [(7, names[0]), (7, names[1]), (8, names[0]), (9, names[1])]
    samples = [
        sample("a dog", key=str(row), image_id=image_id, dataset=name) for row, (image_id, name) in enumerate(pairs)
    ]
    batch = Stage1Collator(qformer, image_ids="shared" if world == "shared" else "dataset")(samples)
    context = build_context(fake_model(), batch, gather_gradients=False)
    likely = torch.full((4, 4), -50.0)
    likely[0, 1] = likely[1, 0] = 50.0
    drawn = sample_hard_negatives(likely, context.same_image, torch.zeros(4, 4)).tolist()
    same = world != "two datasets"
    assert context.same_image.tolist() == [
        [row == column or (same and {row, column} == {0, 1}) for column in range(4)] for row in range(4)
    ]
    assert (drawn[:2] == [1, 0]) is not same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(3, 16, 16)}, "torch.float32"),
        ({"image": np.zeros((3, 16, 16), np.uint8)}, "ndarray"),
        ({"image": torch.zeros(1, 16, 16, dtype=torch.uint8)}, r"shape (1, 16, 16)"),
        ({"image": torch.zeros(3, 16, 20, dtype=torch.uint8)}, r"shape (3, 16, 20)"),
        ({"image": torch.zeros(3, 20, 20, dtype=torch.uint8)}, r"shape (3, 20, 20), in set key good of (3, 16, 16)"),
        ({"image": torch.zeros(5, 64, dtype=torch.uint8)}, r"shape (5, 64), in set key good of (3, 16, 16)"),
        ({"caption": ""}, "a caption ''"),
        ({"caption": b"a dog"}, "a caption b'a dog'"),
        ({"caption": None}, "a caption None"),
        ({"image_id": "285"}, "image id '285'"),
        ({"image_id": 1 << 63}, "image id 9223372036854775808"),
        ({"image_id": 2.0}, "image id 2.0"),
        ({"key": 3}, "key of type int"),
    ],
)
def test_a_sample_that_breaks_the_schema_is_refused_by_name(
    qformer: QFormerTokenizer, encoder_decoder: LanguageModelTokenizer, change: dict[str, object], message: str
) -> None:
    broken = replace(sample("a dog", "bad"), **change)
    for collate in (Stage1Collator(qformer), Stage2Collator(encoder_decoder)):
        with pytest.raises(DataError, match=re.escape(message)) as caught:
            collate([sample("a cat", "good"), broken])
        assert caught.value.where == f"dataset set key {broken.key}"
        with pytest.raises(DataError, match="without samples"):
            collate([])


@pytest.mark.parametrize("caption", ["\u2026", "\u037e a", "e" * 9999, "\U0001f600 " * 60, "a\tb\nc", "\xa0x\u200b"])
@pytest.mark.parametrize("form", [None, "NFC", "NFKD"])
def test_odd_captions_keep_something_to_say(
    encoder_decoder: LanguageModelTokenizer, qformer: QFormerTokenizer, caption: str, form: str | None
) -> None:
    for clean in (True, False):
        collate = Stage2Collator(encoder_decoder, prefix_split=True, clean=clean, unicode_form=form)
        (prompt,), (target,) = collate.split([sample(caption)])
        assert target.strip()
        assert bool(prompt) == (len(collate.text.apply(caption).split()) > 1)
        assert len(collate([sample(caption)])) == len(Stage1Collator(qformer)([sample(caption)])) == 1


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
