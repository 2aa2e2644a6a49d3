"""Rankers: scores are the cosines that the library itself gives, in any batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from capfilt_world import pil, save_clip, tokenizer
from huggingface_world import randomise
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)
from web_shards import random_image

from blip2train.capfilt.ranker import cosine_scores
from blip2train.capfilt.ranker_open_clip import OpenClipRanker
from blip2train.capfilt.ranker_transformers import TransformersRanker
from blip2train.errors import ConfigError, DataError

CPU = torch.device("cpu")
IMAGES = [random_image(number) for number in range(3)]
TEXTS = [["a dog", "the big red bus in the street"], [], ["snow on a tree", "a picture of food", "cat"]]
FLAT = [text for texts in TEXTS for text in texts]
OWNERS = [0, 0, 2, 2, 2]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return folder


def test_scores_are_the_logits_of_transformers_without_their_scale(clip: Path) -> None:
    model = CLIPModel.from_pretrained(clip).eval()
    inputs = AutoProcessor.from_pretrained(clip)(
        text=FLAT, images=[pil(image) for image in IMAGES], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    ranking = TransformersRanker(str(clip), CPU)(IMAGES, TEXTS)
    assert [len(scores) for scores in ranking.scores] == [2, 0, 3]
    found = torch.tensor([score for scores in ranking.scores for score in scores])
    assert torch.allclose(found, logits[OWNERS, range(5)], atol=1e-6)
    assert len({round(score, 3) for score in found.tolist()}) == 5, "texts and images make a difference"


def test_scores_do_not_depend_on_the_batch(clip: Path) -> None:
    rank = TransformersRanker(str(clip), CPU)
    whole = rank(IMAGES, TEXTS).scores
    for image, texts, expected in zip(IMAGES, TEXTS, whole, strict=True):
        for text, score in zip(texts, expected, strict=True):
            assert rank([image], [[text]]).scores == [[pytest.approx(score, abs=1e-6)]]


def test_long_texts_are_cut_and_counted(clip: Path) -> None:
    rank = TransformersRanker(str(clip), CPU)
    fits, long = " ".join(["dog"] * 10), " ".join(["dog"] * 11)
    ranking = rank(IMAGES[:1], [[fits, long, long + " cat"]])
    assert ranking.num_truncated == 2
    assert ranking.scores[0] == [pytest.approx(ranking.scores[0][0], abs=1e-6)] * 3, "the same ten words are read"


def test_siglip_reads_texts_padded_to_their_full_length(tmp_path: Path) -> None:
    text = tokenizer(["<pad>", "[UNK]", "</s>"], "$A </s>", pad_token="<pad>", eos_token="</s>", model_max_length=9)
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = SiglipConfig(
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        text_config=vision | {"vocab_size": len(text), "max_position_embeddings": 9, "projection_size": 24},
    )
    model = SiglipModel(config).eval()
    randomise(model, seed=3)
    model.save_pretrained(tmp_path)
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    images.save_pretrained(tmp_path)
    text.save_pretrained(tmp_path)
    with torch.no_grad():
        ids = text(FLAT, padding="max_length", max_length=9, truncation=True, return_tensors="pt").input_ids
        pixels = images(images=[pil(image) for image in IMAGES], return_tensors="pt")["pixel_values"]
        output = model(input_ids=ids, pixel_values=pixels)
    expected = (output.logits_per_image - model.logit_bias) / model.logit_scale.exp()
    found = TransformersRanker(str(tmp_path), CPU)(IMAGES, TEXTS).scores
    assert torch.allclose(torch.tensor(found[0] + found[2]), expected[OWNERS, range(5)], atol=1e-5)


def test_open_clip_gives_its_own_scores(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "tiny-clip.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("tiny-clip")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with torch.no_grad():
        images, texts, _ = model.eval()(
            torch.stack([transform(pil(image)) for image in IMAGES]), open_clip.get_tokenizer("tiny-clip")(FLAT)
        )
    expected = (images @ texts.T)[OWNERS, range(5)]
    rank = OpenClipRanker(f"open_clip:tiny-clip/{tmp_path}/weights.pt", CPU)
    ranking = rank(IMAGES, TEXTS)
    assert torch.allclose(torch.tensor(ranking.scores[0] + ranking.scores[2]), expected, atol=1e-6)
    assert ranking.num_truncated == 0
    fits, long = " ".join(["dog"] * 14), " ".join(["dog"] * 15)
    assert (
        OpenClipRanker(f"open_clip:tiny-clip/{tmp_path}/weights.pt", CPU)(IMAGES[:1], [[fits, long]]).num_truncated == 1
    )


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("open_clip:ViT-B-32", "without weights"),
        ("open_clip:ViT-B-32/no-such-tag", "cannot be loaded as a ranker of open_clip"),
        ("open_clip:no-such-model/openai", "cannot be loaded as a ranker of open_clip"),
    ],
)
def test_open_clip_without_such_a_model_says_so(model: str, named: str) -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(ConfigError, match=named):
        OpenClipRanker(model, CPU)


def test_a_model_without_image_features_is_refused(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=3, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is BertModel
    with pytest.raises(ConfigError, match="no image and text features"):
        TransformersRanker(str(tmp_path), CPU)


def test_a_score_that_is_not_finite_stops_the_work() -> None:
    with pytest.raises(DataError, match="not finite"):
        cosine_scores(torch.ones(1, 3), torch.tensor([[1.0, torch.inf, 0.0]]), [1], "a model")


def test_cosines_of_half_precision_features_are_taken_in_full_precision() -> None:
    images, texts = torch.randn(2, 512).half(), torch.randn(3, 512).half()
    found = cosine_scores(images, texts, [1, 2], "a model")
    expected = torch.nn.functional.cosine_similarity(images[[0, 1, 1]].double(), texts.double())
    assert torch.allclose(torch.tensor(found[0] + found[1], dtype=torch.float64), expected, atol=1e-6)
