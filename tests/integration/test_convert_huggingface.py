"""transformers' Blip2 -> ours -> transformers: every tensor bit-equal, logits and token ids those of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_world import (
    SIZE,
    assert_bit_equal,
    language_model_tokenizer,
    save_generation,
    save_retrieval,
    saved_tensors,
)
from torch import Tensor, nn
from transformers import AutoProcessor, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from blip2train.batch import Stage2Batch
from blip2train.cli.config import build, compose
from blip2train.cli.convert import convert
from blip2train.cli.evaluate import load_model, load_run_config
from blip2train.model.language_model.base import GenerationSettings
from blip2train.run_dir import RunDir

PROMPTS = ["a photo of", "question w3 w4 w5 answer"]
TEXTS = ("opt", "t5", "llama")


def run_convert(start: str, end: str, source: Path, target: Path, *overrides: str) -> Any:
    return convert(
        compose("convert", [f"from={start}", f"to={end}", f"source={source}", f"target={target}", *overrides])
    )


def our_model(folder: Path) -> tuple[Any, Any]:
    """The model of a run folder as `evaluate` builds it, and its config."""
    run = RunDir.open(folder)
    config = load_run_config(run)
    return load_model(config, run), config


def pixels(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module", params=TEXTS)
def generation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Kind of language model, the folder of transformers, the run folder made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    save_generation(folder / "source", request.param)
    run_convert("huggingface", "blip2train", folder / "source", folder / "run")
    return request.param, folder / "source", folder / "run"


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("retrieval")
    save_retrieval(folder / "source")
    run_convert("huggingface", "blip2train", folder / "source", folder / "run")
    return folder / "source", folder / "run"


def test_tensors_come_back_bit_equal(generation: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, source, run = generation
    run_convert("blip2train", "huggingface", run, tmp_path / "back")
    assert_bit_equal(saved_tensors(source), saved_tensors(tmp_path / "back"))
    for name in ("tokenizer.json", "processor_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert "# huggingface_stage2" in (tmp_path / "back" / "README.md").read_text()


def test_retrieval_tensors_come_back_bit_equal(retrieval: tuple[Path, Path], tmp_path: Path) -> None:
    source, run = retrieval
    report = run_convert("blip2train", "huggingface", run, tmp_path / "back")
    assert_bit_equal(saved_tensors(source), saved_tensors(tmp_path / "back"))
    assert not report.not_held, "what the import put in is no loss on the way back"


@torch.no_grad()
def test_logits_are_those_of_transformers(generation: tuple[str, Path, Path]) -> None:
    """Teacher-forced logits of every target token, on the pixels that transformers' own processor makes."""
    text, source, run = generation
    theirs = Blip2ForConditionalGeneration.from_pretrained(source).eval()
    processor = AutoProcessor.from_pretrained(source)
    model, config = our_model(run)
    images, target = pixels(), torch.tensor([[7, 9, 11, 1], [12, 8, 30, 1]])
    ids, mask = build(config.llm.tokenizer).encode_prompt([PROMPTS[0]] * 2, 32)
    keys = ["0", "1"]
    output = model(Stage2Batch(images, ids, mask, target, torch.ones_like(target, dtype=torch.bool), keys))
    inputs = processor(images=list(images), text=[PROMPTS[0]] * 2, return_tensors="pt")
    if text == "t5":
        starts = torch.cat([torch.zeros(2, 1, dtype=torch.int64), target[:, :-1]], dim=1)
        expected = theirs(**inputs, decoder_input_ids=starts).logits
    else:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], target], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected = theirs(**inputs).logits[:, -5:-1]
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 5])
def test_generated_ids_are_those_of_transformers(generation: tuple[str, Path, Path], num_beams: int) -> None:
    """Greedy and five beams; one by one, and in a batch whose prompts differ in length."""
    text, source, run = generation
    theirs = Blip2ForConditionalGeneration.from_pretrained(source).eval()
    processor = AutoProcessor.from_pretrained(source)
    model, config = our_model(run)
    tokenizer = build(config.llm.tokenizer)
    settings = GenerationSettings(max_new_tokens=8, num_beams=num_beams, end_id=tokenizer.end_id)
    said = []
    for rows in ([0], [1], [0, 1]):
        images, prompts = pixels()[rows], [PROMPTS[row] for row in rows]
        ours = model.generate(images, *tokenizer.encode_prompt(prompts, 32, side="left"), settings)
        inputs = processor(images=list(images), text=prompts, padding=True, return_tensors="pt")
        whole = theirs.generate(**inputs, max_new_tokens=8, num_beams=num_beams)
        expected = whole[:, 1:] if text == "t5" else whole[:, inputs["input_ids"].shape[1] :]
        assert ours.tolist() == expected.tolist()
        said += ours.tolist()
    assert len({tuple(row) for row in said}) > 1, "every image and prompt gives the same text: nothing was compared"


@torch.no_grad()
def test_an_unprompted_caption_is_that_of_transformers(generation: tuple[str, Path, Path]) -> None:
    """Without text, transformers opens a decoder's text by its bos token; its T5 cannot be asked so."""
    text, source, run = generation
    if text == "t5":
        pytest.skip("transformers 5 raises AttributeError: T5Config has no bos_token_id")
    theirs = Blip2ForConditionalGeneration.from_pretrained(source).eval()
    processor = AutoProcessor.from_pretrained(source)
    model, config = our_model(run)
    tokenizer = build(config.llm.tokenizer)
    inputs = processor(images=list(pixels()), return_tensors="pt")
    expected = theirs.generate(**inputs, max_new_tokens=6)
    settings = GenerationSettings(max_new_tokens=6, end_id=tokenizer.end_id)
    ours = model.generate(pixels(), *tokenizer.encode_prompt(["", ""], 32, side="left"), settings)
    assert ours.tolist() == expected[:, -ours.shape[1] :].tolist()


@torch.no_grad()
def test_retrieval_scores_are_those_of_transformers(retrieval: tuple[Path, Path]) -> None:
    """Matching logits, and similarities by cosine, on texts of different length."""
    source, run = retrieval
    theirs = Blip2ForImageTextRetrieval.from_pretrained(source).eval()
    processor = AutoProcessor.from_pretrained(source)
    model, config = our_model(run)
    texts = ["a red square", "w5"]
    inputs = processor(images=list(pixels()), text=texts, padding=True, return_tensors="pt")
    ids, mask = build(config.tokenizer)(texts, 32)
    assert ids.tolist() == inputs["input_ids"].tolist()
    tokens = model.image_tokens(pixels())
    matching = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(model.matching_logits(tokens, ids, mask), matching, rtol=1e-5, atol=1e-5)
    similarity = theirs(**inputs, use_image_text_matching_head=False).logits_per_image
    features = model.image_features(model.encode_image(tokens).hidden)
    ours = torch.einsum("iqe,te->itq", features, model.text_features(ids, mask)).amax(dim=-1)
    torch.testing.assert_close(ours, similarity, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_vision_tower_in_float64(generation: tuple[str, Path, Path]) -> None:
    """The same arithmetic, not a close one: image tokens agree to 1e-10 in float64."""
    _, source, run = generation
    theirs = Blip2ForConditionalGeneration.from_pretrained(source).vision_model.double().eval()
    model, _ = our_model(run)
    encoder, norm = model.vision_encoder.backbone.double(), model.ln_vision.double()
    images = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = norm(encoder.forward_features(images))
    torch.testing.assert_close(ours, theirs(images).last_hidden_state, rtol=1e-10, atol=1e-10)
    assert isinstance(norm, nn.LayerNorm) and norm.eps == 1e-6


def test_a_tokenizer_that_opens_no_text(tmp_path: Path) -> None:
    """Prompts get the ids that the source's own tokenizer gives them, whether or not it puts a start token."""
    save_generation(tmp_path / "source", "opt", framed=False)
    run_convert("huggingface", "blip2train", tmp_path / "source", tmp_path / "run")
    config = load_run_config(RunDir.open(tmp_path / "run"))
    ids, mask = build(config.llm.tokenizer).encode_prompt(PROMPTS, 32)
    expected = language_model_tokenizer("opt", framed=False)(PROMPTS)["input_ids"]
    assert [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)] == expected
