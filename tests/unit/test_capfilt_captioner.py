"""Captioners: what an image is captioned with depends on the image, its key and the seed, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmark_world import identity, make_language_tokenizer, make_stage1, make_stage2, make_tokenizer
from capfilt_world import pil, save_blip, tokenizer
from huggingface_world import (
    QFORMER,
    SIZE,
    TEXT,
    VISION,
    language_model_tokenizer,
    qformer_tokenizer,
    randomise,
    save_generation,
)
from transformers import (
    AutoProcessor,
    BertConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)
from web_shards import random_image

from blip2train.benchmark.prompting import generate_texts
from blip2train.capfilt.captioner import Captioner, CaptionSettings
from blip2train.capfilt.captioner_run import Stage1Captioner, Stage2Captioner
from blip2train.capfilt.captioner_transformers import TransformersCaptioner
from blip2train.data.image_transform import EvalTransform
from blip2train.errors import ConfigError
from blip2train.model.language_model.base import GenerationSettings

CPU = torch.device("cpu")
IMAGES = [random_image(number) for number in range(4)]
KEYS = ["a", "b", "c", "d"]
DRAWN = CaptionSettings(num_captions=3, max_tokens=7, min_tokens=2)
BEAMS = replace(DRAWN, do_sample=False, num_beams=4)


def save_encoder_decoder(folder: Path) -> None:
    """A model of the kind of nlpconnect/vit-gpt2-image-captioning, which has no processor of its own."""
    encoder = ViTConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=3, image_size=SIZE, patch_size=14
    )
    decoder = BertConfig(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=3,
        is_decoder=True, add_cross_attention=True, initializer_range=0.6,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    torch.manual_seed(0)
    model = VisionEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id = 2
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 3
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]", pad_token="[PAD]", cls_token="[CLS]",
              sep_token="[SEP]").save_pretrained(folder)  # fmt: skip


def save_instructblip(folder: Path) -> None:
    words = language_model_tokenizer("opt")
    images = BlipImageProcessor(size={"height": SIZE, "width": SIZE})
    processor = InstructBlipProcessor(images, words, qformer_tokenizer(), num_query_tokens=4)
    config = InstructBlipConfig(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=TEXT["opt"],
        num_query_tokens=4,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = InstructBlipForConditionalGeneration(config)
    randomise(model, seed=4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_git(folder: Path) -> None:
    text = tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]", pad_token="[PAD]", cls_token="[CLS]",
                     sep_token="[SEP]")  # fmt: skip
    config = GitConfig(
        vision_config={
            "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 3,
            "image_size": SIZE, "patch_size": 14,
        },
        vocab_size=len(text), hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=3,
        max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=0, initializer_range=0.6,
    )  # fmt: skip
    torch.manual_seed(0)
    GitForCausalLM(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    GitProcessor(images, text).save_pretrained(folder)


def of_transformers(save: Callable[[Path], object]) -> Callable[[Path, CaptionSettings], Captioner]:
    def build(folder: Path, settings: CaptionSettings) -> Captioner:
        if not (folder / "config.json").is_file():
            save(folder)
        return TransformersCaptioner(str(folder), settings, CPU)

    return build


def of_stage1(folder: Path, settings: CaptionSettings) -> Captioner:
    model = make_stage1().eval()
    return Stage1Captioner(model, make_tokenizer(), EvalTransform(model.vision_encoder.image), settings, CPU)


def of_stage2(folder: Path, settings: CaptionSettings) -> Captioner:
    model = make_stage2().eval()
    return Stage2Captioner(model, make_language_tokenizer(), EvalTransform(model.vision_encoder.image), settings, CPU)


CAPTIONERS = {
    "blip": of_transformers(save_blip),
    "blip-2 opt": of_transformers(lambda folder: save_generation(folder, "opt")),
    "blip-2 t5": of_transformers(lambda folder: save_generation(folder, "t5")),
    "instructblip": lambda folder, settings: of_transformers(save_instructblip)(
        folder, replace(settings, prompt="a photo of")
    ),
    "git": of_transformers(save_git),
    "encoder and decoder": of_transformers(save_encoder_decoder),
    "stage 1": of_stage1,
    "stage 2": of_stage2,
}


@pytest.mark.parametrize("kind", CAPTIONERS)
def test_captions_do_not_depend_on_the_batch(kind: str, tmp_path: Path) -> None:
    caption = CAPTIONERS[kind](tmp_path, DRAWN)
    whole = caption(IMAGES, KEYS)
    assert [len(texts) for texts in whole] == [3, 3, 3, 3]
    torch.manual_seed(99)  # the library's own generator has no say
    assert [caption([image], [key])[0] for image, key in zip(IMAGES, KEYS, strict=True)] == whole
    assert caption(IMAGES[::-1], KEYS[::-1]) == whole[::-1]


@pytest.mark.parametrize("kind", CAPTIONERS)
def test_another_key_or_seed_draws_other_captions(kind: str, tmp_path: Path) -> None:
    build = CAPTIONERS[kind]
    caption = build(tmp_path, DRAWN)
    texts = caption(IMAGES[:2], KEYS[:2])
    assert len(set(texts[0])) > 1, "the captions of one image are drawn apart"
    assert caption(IMAGES[:2], ["other", "names"]) != texts
    assert build(tmp_path, replace(DRAWN, seed=5))(IMAGES[:2], KEYS[:2]) != texts


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    save_blip(folder)
    return folder


def test_beams_are_those_of_transformers(blip: Path) -> None:
    model = BlipForConditionalGeneration.from_pretrained(blip).eval()
    processor = AutoProcessor.from_pretrained(blip)
    inputs = processor(images=[pil(IMAGES[0])], text=["a picture of"], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    ids = model.generate(
        **inputs, num_beams=4, num_return_sequences=3, do_sample=False, min_new_tokens=2, max_new_tokens=7,
        repetition_penalty=1.1,
    )  # fmt: skip
    expected = [
        text.removeprefix("a picture of").strip() for text in processor.batch_decode(ids, skip_special_tokens=True)
    ]
    assert TransformersCaptioner(str(blip), BEAMS, CPU)(IMAGES, KEYS)[0] == expected


def test_lengths_count_what_follows_the_prompt(blip: Path) -> None:
    exactly = replace(DRAWN, min_tokens=4, max_tokens=5, num_captions=8)
    texts = TransformersCaptioner(str(blip), exactly, CPU)(IMAGES, KEYS)
    words = {len(text.split()) for row in texts for text in row}
    assert words <= {3, 4, 5}, "special tokens that an untrained model writes are not words"
    assert max(words) == 5


def test_blip_is_asked_for_a_picture_of_something_and_the_prompt_is_cut_from_its_captions(blip: Path) -> None:
    default = TransformersCaptioner(str(blip), DRAWN, CPU)
    assert default.settings.prompt == "a picture of"
    assert default(IMAGES, KEYS) == TransformersCaptioner(str(blip), replace(DRAWN, prompt="a picture of"), CPU)(
        IMAGES, KEYS
    )
    assert default(IMAGES, KEYS) != TransformersCaptioner(str(blip), replace(DRAWN, prompt=""), CPU)(IMAGES, KEYS)
    assert not any(text.startswith("a picture of") for row in default(IMAGES, KEYS) for text in row)


def test_a_greedy_caption_of_stage_2_is_the_one_of_the_benchmark() -> None:
    settings = replace(BEAMS, num_captions=1, num_beams=1, repetition_penalty=1.0)
    model, words = make_stage2().eval(), make_language_tokenizer()
    squares = [image[:, :8, :8].contiguous() for image in IMAGES]
    ours = Stage2Captioner(model, words, identity, settings, CPU)(squares, KEYS)
    generation = GenerationSettings(max_new_tokens=7, min_new_tokens=2)
    with torch.no_grad():
        visual = model.visual_prompt(torch.stack(squares))
        expected = generate_texts(
            model, words, [""] * 4, visual, generation, device=CPU, batch_size=2, max_tokens=32
        )  # fmt: skip
    assert [texts[0] for texts in ours] == expected


def test_a_greedy_caption_of_stage_1_takes_the_most_likely_token_after_every_prefix() -> None:
    settings = replace(BEAMS, num_captions=1, num_beams=1, repetition_penalty=1.0, min_tokens=0)
    model, words = make_stage1().eval(), make_tokenizer()
    squares = [image[:, :8, :8].contiguous() for image in IMAGES]
    ours = Stage1Captioner(model, words, identity, settings, CPU)(squares, KEYS)
    for image, texts in zip(squares, ours, strict=True):
        with torch.no_grad():
            query = model.encode_image(model.image_tokens(image[None]))
            ids = torch.tensor([[words.dec_id]])
            while ids.shape[1] <= 7 and int(ids[0, -1]) != words.sep_id:
                logits = model.generation_logits(ids, torch.ones_like(ids, dtype=torch.bool), query)
                ids = torch.cat([ids, logits[:, -1:].argmax(dim=2)], dim=1)
        assert texts == [" ".join(words.decode(ids[:, 1:])[0].split())]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"num_captions": 0}, "num_captions=0"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": 0.0}, "temperature"),
        ({"min_tokens": 20}, "min_tokens=20 with max_tokens=20"),
        ({"num_beams": 3}, "do_sample with num_beams=3"),
        ({"do_sample": False, "num_beams": 3}, "10 captions from 3 beams"),
        ({"num_captions": "many"}, "num_captions='many'"),
        ({"num_captions": 2.5}, "num_captions=2.5"),
        ({"num_beams": True}, "num_beams=True"),
        ({"do_sample": "sometimes"}, "do_sample='sometimes'"),
        ({"top_p": None}, "top_p=None"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"prompt": 5}, "prompt=5"),
        ({"seed": [1]}, r"seed=\[1\]"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(setting: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        CaptionSettings(**setting)


def test_a_run_without_sampling_gives_one_caption() -> None:
    with pytest.raises(ConfigError, match="would all be the same"):
        of_stage2(Path(), BEAMS)
    with pytest.raises(ConfigError, match="no beam search"):
        of_stage1(Path(), replace(BEAMS, num_captions=1))


def test_instructblip_wants_an_instruction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without an instruction"):
        of_transformers(save_instructblip)(tmp_path, DRAWN)


def test_a_model_that_is_none_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded as a captioner"):
        TransformersCaptioner(str(tmp_path), DRAWN, CPU)
