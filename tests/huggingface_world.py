"""Tiny models of transformers' Blip2 classes, with tokenizer and processor, saved as a user would save them.

Every weight is random, those that transformers starts at zero or one included: no tensor can be left out unseen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
    PreTrainedTokenizerFast,
)

SIZE = 28
WORDS = [f"w{number}" for number in range(40)] + ["a", "photo", "of", "question", "answer", "red", "square"]
VISION = {
    "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": SIZE,
    "patch_size": 14,
}  # fmt: skip
QFORMER = {
    "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 32, "encoder_hidden_size": 24,
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "opt": {
        "model_type": "opt", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": 2,
    },
    "t5": {
        "model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1,
        "decoder_start_token_id": 0,
    },
    "llama": {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": 2,
    },
}  # fmt: skip


def language_model_tokenizer(text: str, *, framed: bool = True) -> PreTrainedTokenizerFast:
    """Words; framed as the real tokenizers are: T5's closes a text, the others' open it."""
    specials = {"pad_token": "<pad>", "eos_token": "</s>"} | ({} if text == "t5" else {"bos_token": "<s>"})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<s>", "<unk>", *WORDS])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    if framed:
        single = "$A </s>" if text == "t5" else "<s> $A"
        model.post_processor = TemplateProcessing(single=single, special_tokens=[("</s>", 1), ("<s>", 2)])
    side = "right" if text == "t5" else "left"
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", padding_side=side, **specials)


def qformer_tokenizer() -> PreTrainedTokenizerFast:
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "bos_token": "[DEC]"}
    vocabulary = {word: index for index, word in enumerate([*names.values(), "[UNK]", *WORDS])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    model.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", **names)


def randomise(model: nn.Module, seed: int) -> None:
    """Random values in every parameter, none of them at rest; k biases stay zero, as in the released weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if norm else 0.25 * noise)
            if name.endswith("self_attn.qkv.bias"):
                parameter.view(3, -1)[1] = 0


def save_generation(folder: Path, text: str, *, framed: bool = True, dtype: torch.dtype | None = None,
                    shard: str = "5GB", **changes: Any) -> Blip2ForConditionalGeneration:  # fmt: skip
    """A tiny `Blip2ForConditionalGeneration` with its processor in `folder`."""
    tokenizer = language_model_tokenizer(text, framed=framed)
    images = BlipImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.4, 0.5, 0.6])
    processor = Blip2Processor(images, tokenizer, num_query_tokens=4)
    config = Blip2Config(
        vision_config=VISION | changes.get("vision", {}),
        qformer_config=QFORMER | changes.get("qformer", {}),
        text_config=TEXT[text],
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config).eval()
    if text == "t5":  # transformers ties whatever the config says; Flan-T5 has a head of its own
        model.language_model.lm_head.weight = nn.Parameter(model.language_model.lm_head.weight.clone())
    randomise(model, seed=1)
    if dtype is not None:
        model.to(dtype)
        model.qformer.to(torch.float32)
        model.query_tokens.data = model.query_tokens.data.to(torch.float32)
    model.save_pretrained(folder, max_shard_size=shard)
    processor.save_pretrained(folder)
    return model


def save_retrieval(folder: Path) -> Blip2ForImageTextRetrieval:
    """A tiny `Blip2ForImageTextRetrieval` with its processor in `folder`."""
    images = BlipImageProcessor(size={"height": SIZE, "width": SIZE})
    tokenizer = qformer_tokenizer()
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER | {"use_qformer_text_input": True},
        text_config=TEXT["opt"],
        num_query_tokens=4,
        image_text_hidden_size=16,
    )
    model = Blip2ForImageTextRetrieval(config).eval()
    randomise(model, seed=2)
    model.save_pretrained(folder)
    Blip2Processor(images, tokenizer).save_pretrained(folder)
    return model


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files, by name."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return tensors


def assert_bit_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
