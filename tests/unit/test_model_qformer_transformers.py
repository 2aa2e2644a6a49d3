"""The Q-Former against transformers' Blip2: their classes, holding our weights, give our states and scores."""

import pytest
import torch
import torch.nn.functional as F
from tiny_model import random_text, tiny_qformer
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerModel

from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.model.qformer.qformer import QFormer

P = 7
IDS, MASK = random_text([6, 4, 1])
IMAGE = torch.randn(3, P, 24, generator=torch.Generator().manual_seed(3))
THEIR_BLOCK = {
    "self_attention": ("attention.attention", "attention.output"),
    "cross_attention": ("crossattention.attention", "crossattention.output"),
    "query_ffn": ("intermediate_query", "output_query"),
    "text_ffn": ("intermediate", "output"),
}


class GivenTokens(nn.Module):
    """Stands for a vision encoder on both sides: its image tokens are its input."""

    image, embed_dim, num_tokens = None, 24, P

    def forward(self, pixel_values: Tensor, **_: object) -> tuple[Tensor]:
        return (pixel_values,)


def their_name(name: str) -> str:
    """Our Q-Former parameter name in transformers' Blip2QFormerModel."""
    _, layer, part, which, kind = name.split(".")
    first, second = THEIR_BLOCK[part]
    their_part = {
        "query": f"{first}.query", "key": f"{first}.key", "value": f"{first}.value", "output": f"{second}.dense",
        "norm": f"{second}.LayerNorm", "expand": f"{first}.dense", "contract": f"{second}.dense",
    }[which]  # fmt: skip
    return f"encoder.layer.{layer}.{their_part}.{kind}"


@pytest.fixture(scope="module")
def ours() -> QFormer:
    return tiny_qformer().eval()


@pytest.fixture(scope="module")
def theirs(ours: QFormer) -> Blip2ForImageTextRetrieval:
    """Tiny Blip2ForImageTextRetrieval with our weights; loading is strict, so every one of theirs comes from ours."""
    qformer_config = {
        "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 48,
        "max_position_embeddings": 16, "encoder_hidden_size": 24, "use_qformer_text_input": True,
    }  # fmt: skip
    vision_config = {
        "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 14,
    }  # fmt: skip
    config = Blip2Config(
        qformer_config=qformer_config, vision_config=vision_config, num_query_tokens=5, image_text_hidden_size=16
    )
    model = Blip2ForImageTextRetrieval(config).eval()
    model.vision_model = GivenTokens()
    weights = {their_name(n): p for n, p in ours.named_parameters() if n.startswith("blocks.")}
    weights |= {f"layernorm.{n}": p for n, p in ours.embedding_norm.named_parameters()}
    model.qformer.load_state_dict(weights)
    model.query_tokens.data.copy_(ours.query_tokens)
    model.embeddings.word_embeddings.weight.data.copy_(ours.text_embeddings.word.weight)
    model.embeddings.position_embeddings.weight.data.copy_(ours.text_embeddings.position.weight)
    return model


@torch.no_grad()
def test_query_states(ours: QFormer, theirs: Blip2ForImageTextRetrieval) -> None:
    assert isinstance(theirs.qformer, Blip2QFormerModel)
    expected = theirs.qformer(theirs.query_tokens.expand(3, -1, -1), encoder_hidden_states=IMAGE).last_hidden_state
    torch.testing.assert_close(ours.encode_image(IMAGE).hidden, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_text_states(ours: QFormer, theirs: Blip2ForImageTextRetrieval) -> None:
    embeddings = theirs.embeddings(input_ids=IDS)
    expected = theirs.qformer(embeddings, query_length=0, attention_mask=MASK.long()).last_hidden_state
    torch.testing.assert_close(ours.encode_text(IDS, MASK)[MASK], expected[MASK], rtol=0, atol=1e-5)


@torch.no_grad()
def test_matching_logits_and_contrastive_similarities(ours: QFormer, theirs: Blip2ForImageTextRetrieval) -> None:
    model = Blip2Stage1(_TokensOnly(), ours, contrastive_dim=16, ln_vision=False).eval()
    for mine, other in (
        (model.itm_head, theirs.itm_head),
        (model.vision_proj, theirs.vision_projection),
        (model.text_proj, theirs.text_projection),
    ):
        mine.load_state_dict(other.state_dict())
    tokens = model.image_tokens(IMAGE)
    matching = theirs(IMAGE, IDS, MASK.long(), use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(model.matching_logits(tokens, IDS, MASK), matching, rtol=0, atol=1e-5)
    similarity = theirs(IMAGE, IDS, MASK.long(), use_image_text_matching_head=False).logits_per_image
    image_features = model.image_features(model.encode_image(tokens).hidden)
    ours_BB = torch.stack([image_features @ text for text in model.text_features(IDS, MASK)], dim=1).amax(dim=-1)
    torch.testing.assert_close(ours_BB, similarity, rtol=0, atol=1e-5)
    assert F.mse_loss(similarity, similarity.mean().expand_as(similarity)) > 1e-6


class _TokensOnly(GivenTokens):
    def forward(self, pixel_values: Tensor, **_: object) -> Tensor:  # type: ignore[override]
        return pixel_values
