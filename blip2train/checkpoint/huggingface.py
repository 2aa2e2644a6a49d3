"""Our parameters <-> the tensors of transformers' Blip2 classes: the rename table, and the few that differ in form.

Not in the paper. transformers ships no converter from it or to it; its classes lack the temperature and the [DEC] head
of stage 1 and hold the encoder's q, k and v biases as one vector, where timm's EVA has no k bias at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from blip2train.checkpoint.rename import Rule, translate

Kind = Literal["retrieval", "generation"]
"""Which class: `Blip2ForImageTextRetrieval` is stage 1, `Blip2ForConditionalGeneration` stage 2."""

CLASSES: dict[Kind, str] = {
    "retrieval": "Blip2ForImageTextRetrieval",
    "generation": "Blip2ForConditionalGeneration",
}
STAGES: dict[Kind, int] = {"retrieval": 1, "generation": 2}

VISION = "vision_encoder.backbone."
LANGUAGE_MODEL = "language_model.model."

_BLOCK_PARTS = {
    "self_attention.query": "attention.attention.query",
    "self_attention.key": "attention.attention.key",
    "self_attention.value": "attention.attention.value",
    "self_attention.output": "attention.output.dense",
    "self_attention.norm": "attention.output.LayerNorm",
    "cross_attention.query": "crossattention.attention.query",
    "cross_attention.key": "crossattention.attention.key",
    "cross_attention.value": "crossattention.attention.value",
    "cross_attention.output": "crossattention.output.dense",
    "cross_attention.norm": "crossattention.output.LayerNorm",
    "query_ffn.expand": "intermediate_query.dense",
    "query_ffn.contract": "output_query.dense",
    "query_ffn.norm": "output_query.LayerNorm",
    "text_ffn.expand": "intermediate.dense",
    "text_ffn.contract": "output.dense",
    "text_ffn.norm": "output.LayerNorm",
}
_VISION_BLOCK_PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
SHARED = (
    Rule("qformer.query_tokens", "query_tokens"),
    Rule("qformer.embedding_norm.{leaf}", "qformer.layernorm.{leaf}"),
    Rule("ln_vision.{leaf}", "vision_model.post_layernorm.{leaf}"),
    Rule(f"{VISION}cls_token", "vision_model.embeddings.class_embedding"),
    Rule(f"{VISION}pos_embed", "vision_model.embeddings.position_embedding"),
    Rule(f"{VISION}patch_embed.proj.{{leaf}}", "vision_model.embeddings.patch_embedding.{leaf}"),
    *(
        Rule(f"qformer.blocks.{{i}}.{ours}.{{leaf}}", f"qformer.encoder.layer.{{i}}.{theirs}.{{leaf}}")
        for ours, theirs in _BLOCK_PARTS.items()
    ),
    *(
        Rule(f"{VISION}blocks.{{i}}.{ours}.{{leaf}}", f"vision_model.encoder.layers.{{i}}.{theirs}.{{leaf}}")
        for ours, theirs in _VISION_BLOCK_PARTS.items()
    ),
)
RULES: dict[Kind, tuple[Rule, ...]] = {
    "retrieval": (
        *SHARED,
        Rule("qformer.text_embeddings.word.weight", "embeddings.word_embeddings.weight"),
        Rule("qformer.text_embeddings.position.weight", "embeddings.position_embeddings.weight"),
        Rule("vision_proj.{leaf}", "vision_projection.{leaf}"),
        Rule("text_proj.{leaf}", "text_projection.{leaf}"),
        Rule("itm_head.{leaf}", "itm_head.{leaf}"),
    ),
    "generation": (
        *SHARED,
        Rule("projection.{leaf}", "language_projection.{leaf}"),
        Rule(f"{LANGUAGE_MODEL}{{rest}}", "language_model.{rest}"),
    ),
}
"""One table per class, read in both directions. Our encoder's names are those after `fuse_qkv_bias`."""

_NO_CAPTIONS = "the head that writes captions from [DEC], which transformers' stage 1 does not have"
NOT_HELD = {
    "temperature": "the learned divisor of the contrastive similarities: transformers returns cosines",
    "qformer.lm_head.dense.weight": _NO_CAPTIONS,
    "qformer.lm_head.dense.bias": _NO_CAPTIONS,
    "qformer.lm_head.norm.weight": _NO_CAPTIONS,
    "qformer.lm_head.norm.bias": _NO_CAPTIONS,
    "qformer.lm_head.bias": _NO_CAPTIONS,
}
"""Our stage-1 tensors that no class of transformers has."""

_CONSTANT = re.compile(r"embeddings\.position_ids")  # a counter that old versions saved
_TEXT_FFN = re.compile(r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\..+")


@dataclass(slots=True)
class Tensors:
    """Tensors of one model, apart by where they are kept.

    Args:
        trained: by our parameter names, the heads of stage 1 or the projection of stage 2 included.
        vision: the encoder's, by timm's names.
        language_model: by the names of the language model's own class.
        aside: what ours has no use for, by transformers' names.
    """

    trained: dict[str, Tensor]
    vision: dict[str, Tensor]
    language_model: dict[str, Tensor] = field(default_factory=dict)
    aside: dict[str, Tensor] = field(default_factory=dict)


def to_ours(state: Mapping[str, Tensor], kind: Kind, where: str, eva: bool | None = None) -> Tensors:
    """Take a transformers Blip2 state apart; number formats stay.

    Args:
        state: every tensor of the model, by transformers' names.
        kind: of which class it is.
        where: folder of the state, for the error.
        eva: write the encoder as timm's EVA; None does so where its lack of a k bias allows it.

    Raises:
        CheckpointError: a name that the class does not have; lists all of them.
    """
    aside = {name: tensor for name, tensor in state.items() if _has_no_use(name, kind)}
    used = {name: tensor for name, tensor in state.items() if name not in aside}
    ours = translate(used, RULES[kind], to="ours", where=where)
    tensors = Tensors({}, {}, {}, aside)
    for name, tensor in ours.items():
        if name.startswith(VISION):
            tensors.vision[name.removeprefix(VISION)] = tensor
        elif name.startswith(LANGUAGE_MODEL):
            tensors.language_model[name.removeprefix(LANGUAGE_MODEL)] = tensor
        else:
            tensors.trained[name] = tensor
    if has_no_k_bias(tensors.vision) if eva is None else eva:
        tensors.vision = split_qkv_bias(tensors.vision)
    return tensors


def to_theirs(tensors: Tensors, kind: Kind, where: str) -> dict[str, Tensor]:
    """Put a state together for transformers' class; what it cannot hold must be gone from `tensors.trained`.

    Raises:
        CheckpointError: a tensor that the class has no place for; lists all of them.
    """
    ours = dict(tensors.trained)
    ours |= {f"{VISION}{name}": tensor for name, tensor in fuse_qkv_bias(tensors.vision).items()}
    ours |= {f"{LANGUAGE_MODEL}{name}": tensor for name, tensor in tensors.language_model.items()}
    return translate(ours, RULES[kind], to="theirs", where=where) | tensors.aside


def is_eva(names: Iterable[str]) -> bool:
    """Whether an encoder's tensors, by timm's names, are those of its EVA: q and v bias apart, none of k."""
    return not any(name.endswith(".attn.qkv.bias") for name in names)


def has_no_k_bias(vision: Mapping[str, Tensor]) -> bool:
    """Whether every k bias is zero (or absent), so that timm's EVA, which has none, can hold the encoder."""
    biases = [tensor for name, tensor in vision.items() if name.endswith(".attn.qkv.bias")]
    return not any(bool(bias.chunk(3)[1].any()) for bias in biases)


def split_qkv_bias(vision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write one qkv bias (3 I,) as EVA's q bias and v bias; only where `has_no_k_bias`."""
    split: dict[str, Tensor] = {}
    for name, tensor in vision.items():
        if name.endswith(".attn.qkv.bias"):
            prefix = name.removesuffix("qkv.bias")
            query, _, value = tensor.chunk(3)
            split |= {f"{prefix}q_bias": query.contiguous(), f"{prefix}v_bias": value.contiguous()}
        else:
            split[name] = tensor
    return split


def fuse_qkv_bias(vision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write EVA's q bias and v bias as one qkv bias with zeros between; other encoders stay as they are."""
    fused: dict[str, Tensor] = {}
    for name, tensor in vision.items():
        if name.endswith(".attn.q_bias"):
            prefix = name.removesuffix("q_bias")
            value = vision[f"{prefix}v_bias"]
            fused[f"{prefix}qkv.bias"] = torch.cat([tensor, torch.zeros_like(tensor), value])
        elif not name.endswith(".attn.v_bias"):
            fused[name] = tensor
    return fused


def _has_no_use(name: str, kind: Kind) -> bool:
    """A constant, or a text feed-forward network that a stage-2 model carries and never runs."""
    return _CONSTANT.fullmatch(name) is not None or (kind == "generation" and _TEXT_FFN.fullmatch(name) is not None)
