"""Released weights -> our form -> the answers that LAVIS's and transformers' own tests record for them.

    python scripts/check_released_weights.py model=blip2-opt-2.7b source=FOLDER image=demo.jpg
    python scripts/check_released_weights.py model=lavis-opt-2.7b source=blip2_pretrained_opt2.7b.pth \
        image=merlion.png experiment=lavis/stage2_vitg_opt_2_7b

Needs the weights (many GB) and the picture the answers are about: docs/_static/merlion.png of LAVIS, demo.jpg of
hf-internal-testing/blip-test-image. What is given besides model, source, image and work goes to `blip2train convert`.
The expected values are those of LAVIS's tests (BSD-3-Clause) and transformers' tests (Apache-2.0).
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blip2train.benchmark.prompting import generate_texts
from blip2train.cli.config import build, compose
from blip2train.cli.convert import convert
from blip2train.cli.evaluate import choose_device, load_model, load_run_config
from blip2train.data.image_transform import EvalTransform, decode_image
from blip2train.errors import Blip2TrainError, ConfigError
from blip2train.model.language_model.base import GenerationSettings
from blip2train.run_dir import RunDir

GREEDY = GenerationSettings(max_new_tokens=20)
LAVIS_BEAMS = GenerationSettings(max_new_tokens=30, min_new_tokens=1, num_beams=5)
TOLERANCE = 1e-3  # of transformers' own test


@dataclass(frozen=True)
class Answer:
    """A prompt and the text that must follow it."""

    prompt: str
    text: str
    settings: GenerationSettings = GREEDY


@dataclass(frozen=True)
class Score:
    """A text, the probability that it matches the picture, and the cosine of the two."""

    text: str
    matching: float
    cosine: float


@dataclass(frozen=True)
class Expected:
    """What one released model answers."""

    format: str
    answers: tuple[Answer, ...] = ()
    scores: tuple[Score, ...] = ()
    overrides: tuple[str, ...] = field(default=())


CITY = "Question: which city is this? Answer:"
MODELS = {
    "blip2-opt-2.7b": Expected(
        "huggingface",
        (Answer("", "a woman sitting on the beach with a dog"), Answer(CITY, "it's not a city, it's a beach")),
    ),
    "blip2-flan-t5-xl": Expected(
        "huggingface", (Answer("", "woman playing with dog on the beach"), Answer(CITY, "san diego"))
    ),
    "blip2-itm-vit-g": Expected(
        "huggingface", scores=(Score("A woman and her dog sitting in a beach", 0.9762, 0.4406),)
    ),
    "lavis-opt-2.7b": Expected("lavis", (Answer("", "the merlion fountain in singapore", LAVIS_BEAMS),)),
    "lavis-opt-2.7b-coco": Expected(
        "lavis", (Answer("a photo of", "a statue of a mermaid spraying water into the air", LAVIS_BEAMS),)
    ),
    "lavis-opt-6.7b": Expected(
        "lavis", (Answer("", "a statue of a merlion in front of a water fountain", LAVIS_BEAMS),)
    ),
    "lavis-opt-6.7b-coco": Expected(
        "lavis", (Answer("a photo of", "a large fountain spraying water into the air", LAVIS_BEAMS),)
    ),
    "lavis-flan-t5-xl": Expected("lavis", (Answer("", "marina bay sands, singapore", LAVIS_BEAMS),)),
    "lavis-flan-t5-xxl": Expected("lavis", (Answer("", "the merlion statue in singapore", LAVIS_BEAMS),)),
}


def check(folder: Path, expected: Expected, image: Path) -> list[str]:
    """Ask a run folder's model and compare; returns what differs, printing every answer."""
    run = RunDir.open(folder)
    config = load_run_config(run)
    device = choose_device("auto")
    model: Any = load_model(config, run).to(device)
    pixels = EvalTransform(model.vision_encoder.image)(decode_image(image.read_bytes()))[None].to(device)
    wrong = []
    for answer in expected.answers:
        tokenizer = build(config.llm.tokenizer)
        with torch.no_grad():
            visual = model.visual_prompt(pixels)
            said = generate_texts(
                model, tokenizer, [answer.prompt], visual, answer.settings, device=device, batch_size=1, max_tokens=32
            )[0]
        print(f"{answer.prompt!r}: {said!r}, expected {answer.text!r}")
        wrong += [] if said == answer.text else [f"{answer.prompt!r}: {said!r} instead of {answer.text!r}"]
    for score in expected.scores:
        found = _scores(model, build(config.tokenizer), score.text, pixels)
        for name, value, wanted in zip(("matching", "cosine"), found, (score.matching, score.cosine), strict=True):
            print(f"{score.text!r}: {name} {value:.4f}, expected {wanted:.4f}")
            wrong += [] if abs(value - wanted) <= TOLERANCE else [f"{name} {value:.4f} instead of {wanted:.4f}"]
    return wrong


@torch.no_grad()
def _scores(model: Any, tokenizer: Any, text: str, pixels: torch.Tensor) -> tuple[float, float]:
    ids, mask = (tensor.to(pixels.device) for tensor in tokenizer([text], 32))
    tokens = model.image_tokens(pixels)
    matching = model.matching_logits(tokens, ids, mask).softmax(dim=1)[0, 1]
    features = model.image_features(model.encode_image(tokens).hidden)[0]
    cosine = (features @ model.text_features(ids, mask)[0]).max()
    return float(matching), float(cosine)


def main(arguments: list[str]) -> int:
    """Convert, ask, compare; 0 if every answer is the recorded one."""
    given = dict(
        item.split("=", 1) for item in arguments if item.split("=", 1)[0] in {"model", "source", "image", "work"}
    )
    rest = [item for item in arguments if item.split("=", 1)[0] not in given]
    if given.get("model") not in MODELS or not {"source", "image"} <= set(given):
        print(f"{__doc__}\nmodel= is one of {', '.join(MODELS)}")
        return 2
    expected = MODELS[given["model"]]
    if not Path(given["image"]).is_file():  # before a conversion of many GB, not after it
        error = ConfigError(
            "no such file", where=f"image={given['image']}", fix=f"give the picture of {given['model']}'s answers"
        )
        print(f"{type(error).__name__}: {error}")
        return 1
    with tempfile.TemporaryDirectory(dir=given.get("work")) as work:
        folder = Path(work) / "run"
        own = [f"from={expected.format}", "to=blip2train", f"source={given['source']}", f"target={folder}"]
        try:
            convert(compose("convert", [*own, *rest]))
            wrong = check(folder, expected, Path(given["image"]))
        except (Blip2TrainError, ConfigError) as error:
            print(f"{type(error).__name__}: {error}")
            return 1
    print("\n".join(["DIFFERENT:", *wrong]) if wrong else "all as recorded")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
