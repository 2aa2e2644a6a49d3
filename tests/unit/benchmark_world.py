"""A world of coloured squares for benchmark tests: shards, tokenizers, and models from a few hundred weights."""

import json
import random
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import OPTConfig, PreTrainedTokenizerFast

from blip2train.batch import ImageSpec
from blip2train.data.shards import ShardWriter
from blip2train.data.tokenizer import LanguageModelTokenizer, QFormerTokenizer
from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.language_model.decoder_only import DecoderOnly
from blip2train.model.qformer.qformer import QFormer

SIZE = 8
COLORS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230), "gray": (120, 120, 120)}
WORDS = ("a", "the", "square", "is", "what", "color", "of", "question", "answer", "?", ":", *COLORS)


def make_record(key: str, color: str, captions: Sequence[str], **fields: Any) -> tuple[str, bytes, dict[str, Any]]:
    """A picture of one colour under noise that depends on the key, so that no two are equal."""
    noise = random.Random(key)
    picture = Image.new("RGB", (SIZE, SIZE))
    pixels = [tuple(channel // 2 + noise.randrange(128) for channel in COLORS[color]) for _ in range(SIZE * SIZE)]
    picture.putdata(pixels)
    file = BytesIO()
    picture.save(file, format="PNG")
    return key, file.getvalue(), {"captions": list(captions), **fields}


def write_records(folder: Path, records: Iterable[tuple[str, bytes, dict[str, Any]]]) -> list[str]:
    with ShardWriter(folder, "val", samples_per_shard=5) as writer:
        for key, image, fields in records:
            writer.write(key, image, "png", json.dumps(fields).encode())
    return [str(path) for path in sorted(folder.glob("val-*.tar"))]


def _fast(specials: dict[str, str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate((*specials.values(), "[UNK]", *WORDS))}
    model = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", **specials)


def make_tokenizer() -> QFormerTokenizer:
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "bos_token": "[DEC]"}
    return QFormerTokenizer(_fast(names))


def make_language_tokenizer() -> LanguageModelTokenizer:
    return LanguageModelTokenizer(_fast({"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}))


class MeanColor(nn.Module):
    """A vision encoder of four tokens: the mean colour of each quarter."""

    image = ImageSpec(SIZE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    embed_dim = 3
    num_tokens = 4
    trainable = False

    def forward(self, pixel_values: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(pixel_values.float() / 255, 2).flatten(2).transpose(1, 2)


def _qformer(vocab_size: int) -> QFormer:
    return QFormer(16, 2, 2, 3, 2, 3, vocab_size, 32, 24, 0.0, initializer_range=0.5)


def make_stage1(seed: int = 0) -> Blip2Stage1:
    torch.manual_seed(seed)
    return Blip2Stage1(MeanColor(), _qformer(make_tokenizer().vocab_size), contrastive_dim=8)


def make_stage2(seed: int = 0) -> Blip2Stage2:
    torch.manual_seed(seed)
    tokenizer = make_language_tokenizer()
    config = OPTConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        init_std=0.5,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.start_id,
        eos_token_id=tokenizer.end_id,
    )
    return Blip2Stage2(MeanColor(), _qformer(tokenizer.vocab_size), DecoderOnly(config))


def identity(image: Tensor, generator: torch.Generator | None) -> Tensor:
    return image


class ScriptedStage2(nn.Module):
    """Its visual prompt is the mean colour, its language model names it."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = ColorNamer()

    def visual_prompt(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.float().mean(dim=(2, 3))[:, None]


class ColorNamer:
    """Says the colour it sees; without an image, the colour it is told, else "red"."""

    def __init__(self) -> None:
        self.tokenizer = make_language_tokenizer()
        self.vocab_size = self.tokenizer.vocab_size

    def generate(self, visual_prompt: Tensor | None, prompt_ids: Tensor, prompt_mask: Tensor, settings: Any) -> Tensor:
        rows = []
        for index, text in enumerate(self.tokenizer.decode(prompt_ids)):
            told = [word for word in text.split() if word in COLORS]
            answer = told[0] if told else "red"
            if visual_prompt is not None:
                answer = _nearest(visual_prompt[index, 0])
            ids, _ = self.tokenizer.encode([answer, "square"], 9)
            rows.append([int(ids[0, 0]), settings.end_id, int(ids[1, 0])])
        return torch.tensor(rows)


def _nearest(mean: Tensor) -> str:
    return min(COLORS, key=lambda name: float((torch.tensor(COLORS[name]) // 2 + 64 - mean).abs().sum()))
