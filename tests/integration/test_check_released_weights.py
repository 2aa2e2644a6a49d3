"""The check of released weights, on a tiny model in their place: passes on its answers, fails on any other."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from huggingface_world import save_generation, save_retrieval
from PIL import Image
from test_convert_huggingface import pixels
from transformers import AutoProcessor, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_released_weights.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_released_weights", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(pixels(1)[0].permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@torch.no_grad()
def test_answers(script: ModuleType, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The expected texts are transformers' own answers, unprompted and prompted."""
    save_generation(tmp_path / "source", "opt")
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "source").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "source")
    texts = []
    for prompt in (None, "a photo of"):
        inputs = processor(images=Image.open(image), text=prompt, return_tensors="pt")
        ids = theirs.generate(**inputs, max_new_tokens=20)
        start = inputs["input_ids"].shape[1] if prompt else 0
        texts.append(processor.decode(ids[0, start:], skip_special_tokens=True).strip())
    answers = (script.Answer("", texts[0]), script.Answer("a photo of", texts[1]))
    monkeypatch.setitem(script.MODELS, "tiny", script.Expected("huggingface", answers))
    own = ["model=tiny", f"source={tmp_path / 'source'}", f"image={image}", f"work={tmp_path}"]
    assert script.main(own) == 0
    wrong = (script.Answer("", texts[0] + " red"),)
    monkeypatch.setitem(script.MODELS, "tiny", script.Expected("huggingface", wrong))
    assert script.main(own) == 1


@torch.no_grad()
def test_scores(script: ModuleType, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_retrieval(tmp_path / "source")
    theirs = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "source").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "source")
    inputs = processor(images=Image.open(image), text="a red square", return_tensors="pt")
    matching = theirs(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(dim=1)[0, 1].item()
    cosine = theirs(**inputs).logits_per_image[0, 0].item()
    own = ["model=tiny", f"source={tmp_path / 'source'}", f"image={image}", f"work={tmp_path}"]
    for error, code in ((0.0, 0), (0.01, 1)):
        score = script.Score("a red square", matching, cosine + error)
        monkeypatch.setitem(script.MODELS, "tiny", script.Expected("huggingface", scores=(score,)))
        assert script.main(own) == code


def test_usage_names_the_models(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([]) == 2
    assert "blip2-itm-vit-g" in capsys.readouterr().out


def test_a_missing_picture_is_named_before_the_weights_are_read(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "convert", lambda _: pytest.fail("converted first"))
    own = ["model=blip2-opt-2.7b", f"source={tmp_path}", f"image={tmp_path / 'demo.jpg'}"]
    assert script.main(own) == 1
    assert "no such file" in (said := capsys.readouterr().out) and f"image={tmp_path / 'demo.jpg'}" in said
