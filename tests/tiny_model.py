"""Small random models for tests: every part of BLIP-2 at sizes that build in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from blip2train.batch import ImageSpec, Stage2Batch
from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.language_model.base import LanguageModel
from blip2train.model.qformer.qformer import QFormer
from blip2train.model.vision_encoder.timm_vit import TimmVisionEncoder

IMAGE = ImageSpec(size=32, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28), interpolation="bicubic")
VIT_ARGS = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
OPT = {
    "model_type": "opt", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 1, "eos_token_id": 2,
    "bos_token_id": 2, "init_std": 0.3,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 1,
    "eos_token_id": 2, "bos_token_id": 3, "initializer_range": 0.3,
}  # fmt: skip
OPT_PROJECTED = OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
QWEN2, QWEN3 = LLAMA | {"model_type": "qwen2"}, LLAMA | {"model_type": "qwen3", "head_dim": 12}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 5}
GPT_NEOX = {
    "model_type": "gpt_neox", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "rotary_pct": 0.25, "pad_token_id": 1, "eos_token_id": 2,
    "bos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
GEMMA = LLAMA | {"model_type": "gemma", "head_dim": 8}
T5 = {
    "model_type": "t5", "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
T5_TIED = T5 | {"feed_forward_proj": "relu", "tie_word_embeddings": True}


def tiny_qformer(**changes: Any) -> QFormer:
    """A Q-Former of 4 layers with weights large enough that every path shows; seeded."""
    sizes = {
        "hidden_size": 24, "num_layers": 4, "num_heads": 3, "num_queries": 5, "cross_attention_every": 2,
        "image_dim": 24, "vocab_size": 40, "intermediate_size": 48, "max_positions": 16, "dropout": 0.1,
        "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    qformer = QFormer(**(sizes | changes))
    with torch.no_grad():
        for parameter in qformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return qformer


def tiny_vit(**changes: Any) -> TimmVisionEncoder:
    """A timm ViT of 3 blocks on 32 x 32 pixels: 17 tokens of width 24; seeded."""
    torch.manual_seed(1)
    return TimmVisionEncoder(
        **(
            {"name": "vit_tiny_patch16_224", "image": IMAGE, "layer": -2, "model_args": VIT_ARGS, "embed_dim": 24}
            | changes
        )
    )


def tiny_stage1(vision: Mapping[str, Any] | None = None, **changes: Any) -> Blip2Stage1:
    vision_encoder, qformer = tiny_vit(**(vision or {})), tiny_qformer()
    torch.manual_seed(2)
    return Blip2Stage1(vision_encoder, qformer, contrastive_dim=16, **changes)


def tiny_stage2(language_model: LanguageModel, vision: Mapping[str, Any] | None = None, **changes: Any) -> Blip2Stage2:
    vision_encoder, qformer = tiny_vit(**(vision or {})), tiny_qformer()
    torch.manual_seed(2)
    return Blip2Stage2(vision_encoder, qformer, language_model, **changes)


def random_images(count: int, size: int = 32) -> Tensor:
    """(count, 3, size, size) uint8; seeded."""
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def random_text(lengths: list[int], vocab_size: int = 40, longest: int | None = None) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, T) of the given lengths, without special ids 0 to 4, and their mask; seeded."""
    longest = max(lengths) if longest is None else longest
    ids = torch.randint(5, vocab_size, (len(lengths), longest), generator=torch.Generator().manual_seed(6))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask


def stage2_batch(prompts: list[int], targets: list[int], vocab_size: int = 60) -> Stage2Batch:
    """A batch with prompts and targets of the given lengths; each target ends with id 2."""
    prompt_ids, prompt_mask = random_text(prompts, vocab_size)
    target_ids, target_mask = random_text(targets, vocab_size)
    target_ids[torch.arange(len(targets)), torch.tensor(targets) - 1] = 2
    keys = [str(row) for row in range(len(prompts))]
    return Stage2Batch(random_images(len(prompts)), prompt_ids, prompt_mask, target_ids, target_mask, keys)
