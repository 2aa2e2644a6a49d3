"""Tiny captioners and rankers of transformers' own classes, saved as users have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_world import randomise
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

SIZE = 32
WORDS = (
    *("a", "picture", "of", "the", "dog", "cat", "red", "blue", "green", "big", "small", "on", "in", "with", "two"),
    *("man", "woman", "bear", "grass", "snow", "street", "table", "plate", "food", "train", "bus", "sign", "tree"),
)


def tokenizer(specials: Sequence[str], template: str, **names: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*specials, *WORDS])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    used = [(word, vocabulary[word]) for word in specials if word in template]
    model.post_processor = TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", **names)


def save_blip(folder: Path, seed: int = 1) -> BlipForConditionalGeneration:
    """A captioner of 28 words."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"]
    text = tokenizer(
        specials, "[CLS] $A [SEP]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", bos_token="[DEC]"
    )
    config = BlipConfig(
        vision_config={
            "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": SIZE, "patch_size": 8,
        },
        text_config={
            "vocab_size": len(text), "hidden_size": 24, "encoder_hidden_size": 24, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 64, "projection_dim": 16,
            "bos_token_id": 4, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0,
        },
        projection_dim=16,
    )  # fmt: skip
    model = BlipForConditionalGeneration(config).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": SIZE, "width": SIZE}), text).save_pretrained(folder)
    return model


def save_clip(folder: Path, seed: int = 2, positions: int = 12) -> CLIPModel:
    """A ranker that reads `positions` tokens."""
    text = tokenizer(
        ["<pad>", "[UNK]", "<start>", "<end>"], "<start> $A <end>", pad_token="<pad>", bos_token="<start>",
        eos_token="<end>",
    )  # fmt: skip
    config = CLIPConfig(
        vision_config={
            "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": SIZE, "patch_size": 8,
        },
        text_config={
            "vocab_size": len(text), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 3, "max_position_embeddings": positions, "bos_token_id": 2, "eos_token_id": 3,
            "pad_token_id": 0,
        },
        projection_dim=16,
    )  # fmt: skip
    model = CLIPModel(config).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    CLIPProcessor(images, text).save_pretrained(folder)
    return model


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
