"""config.json and the processor's files of transformers' Blip2 <-> the settings of our model's yaml.

Not in the paper. A setting of one side that the other cannot compute is refused with all its like; transformers itself
ignores unknown settings in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import Blip2Config

from blip2train.checkpoint.huggingface import CLASSES, Kind
from blip2train.errors import CheckpointError, ConfigError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TIMM_EPS = 1e-6  # LayerNorm of timm's ViTs
BERT_EPS = 1e-12  # our QFormer's default
_NO_SHAPE = (
    "transformers_version",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "id2label",
    "label2id",
    "problem_type",
    "_name_or_path",
    "chunk_size_feed_forward",
    "architectures",
    "dtype",
)
_PATCH_EMBEDDING = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


def model_kind(raw: Mapping[str, Any], where: str) -> Kind:
    """Which of the two classes a config.json is of.

    Raises:
        CheckpointError: another class (InstructBLIP, ...).
    """
    named = raw.get("architectures") or []
    for kind, name in CLASSES.items():
        if raw.get("model_type") == "blip-2" and named == [name]:
            return kind
    raise CheckpointError(
        f"a {raw.get('model_type')} of class {', '.join(named) or 'unknown (no architectures)'}",
        where=where,
        fix=f"one of {', '.join(CLASSES.values())}, saved by save_pretrained",
    )


def read_config(raw: Mapping[str, Any], kind: Kind, where: str) -> Blip2Config:
    """Fill a config.json's defaults and refuse what our model does not compute.

    Raises:
        CheckpointError: lists every unsupported value.
    """
    try:
        config = Blip2Config.from_dict(dict(raw))
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"not a config that transformers reads: {error}", where=where, fix="save the model again"
        ) from error
    problems = [*_vision_problems(config.vision_config), *_qformer_problems(config.qformer_config, kind)]
    if problems:
        raise CheckpointError(
            f"{len(problems)} unsupported settings:\n    " + "\n    ".join(problems),
            where=where,
            fix="convert a model with the settings of the released ones",
        )
    return config


def _vision_problems(vision: Any) -> list[str]:
    problems = {
        f"vision_config.hidden_act is {vision.hidden_act!r}; timm's ViT computes 'gelu'": vision.hidden_act != "gelu",
        f"vision_config.image_size is {vision.image_size}, not one number": not isinstance(vision.image_size, int),
        f"vision_config.patch_size is {vision.patch_size}, not one number": not isinstance(vision.patch_size, int),
    }
    return [problem for problem, found in problems.items() if found]


def _qformer_problems(qformer: Any, kind: Kind) -> list[str]:
    no_text = kind == "retrieval" and not qformer.use_qformer_text_input
    problems = {
        f"qformer_config.hidden_act is {qformer.hidden_act!r}; ours is 'gelu', as BERT's": qformer.hidden_act != "gelu",
        "qformer_config.use_qformer_text_input is false: a retrieval model without a text branch": no_text,
    }
    return [problem for problem, found in problems.items() if found]


def config_notes(config: Blip2Config, kind: Kind) -> list[str]:
    """Settings that do not change what ours computes, but are worth a word: those that only training reads, for one."""
    qformer, vision = config.qformer_config, config.vision_config
    hidden, attention = qformer.hidden_dropout_prob, qformer.attention_probs_dropout_prob
    notes = {
        "its config has no image_token_index: transformers 5 cannot run it, ours needs none": (
            kind == "generation" and config.image_token_index is None
        ),
        f"the Q-Former's dropout is {hidden} and {attention} on attention; ours takes {hidden} for both": (
            hidden != attention
        ),
        f"the vision encoder's attention dropout {vision.attention_dropout} is left out; ours has none": (
            vision.attention_dropout != 0
        ),
    }
    return [note for note, found in notes.items() if found]


def qformer_settings(config: Blip2Config) -> dict[str, Any]:
    """Our `QFormer`'s arguments."""
    theirs = config.qformer_config
    return {
        "hidden_size": theirs.hidden_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "intermediate_size": theirs.intermediate_size,
        "num_queries": config.num_query_tokens,
        "cross_attention_every": theirs.cross_attention_frequency,
        "image_dim": config.vision_config.hidden_size,
        "vocab_size": theirs.vocab_size,
        "max_positions": theirs.max_position_embeddings,
        "dropout": theirs.hidden_dropout_prob,
        "layer_norm_eps": theirs.layer_norm_eps,
        "pad_id": theirs.pad_token_id or 0,
    }


def blip2_config(values: Mapping[str, Any]) -> Blip2Config:
    """transformers' config of these values, its defaults for the rest."""
    return Blip2Config.from_dict(dict(values))


def qformer_config(ours: Mapping[str, Any], *, text: bool) -> dict[str, Any]:
    """`Blip2QFormerConfig`'s values for our `QFormer`'s arguments; `text` keeps the text branch."""
    return {
        "vocab_size": ours["vocab_size"],
        "hidden_size": ours["hidden_size"],
        "num_hidden_layers": ours["num_layers"],
        "num_attention_heads": ours["num_heads"],
        "intermediate_size": ours["intermediate_size"],
        "hidden_dropout_prob": ours["dropout"],
        "attention_probs_dropout_prob": ours["dropout"],
        "max_position_embeddings": ours["max_positions"],
        "layer_norm_eps": ours.get("layer_norm_eps", BERT_EPS),
        "pad_token_id": ours.get("pad_id", 0),
        "cross_attention_frequency": ours["cross_attention_every"],
        "encoder_hidden_size": ours["image_dim"],
        "use_qformer_text_input": text,
    }


def architecture(text_config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a language model's config says its shape, for a yaml."""
    return {key: value for key, value in text_config.items() if value is not None and key not in _NO_SHAPE}


def vision_settings(config: Blip2Config, processor: Mapping[str, Any], dtype: str, eva: bool) -> dict[str, Any]:
    """The yaml of a `TimmVisionEncoder` that computes transformers' vision model, its last LayerNorm excepted.

    Args:
        config: the model's.
        processor: settings of the image processor, empty where the source has none.
        dtype: number format of the weights.
        eva: timm's EVA, whose attention has no k bias; a plain ViT, which is otherwise the same network, has one.
    """
    theirs = config.vision_config
    model_args: dict[str, Any] = {
        "patch_size": theirs.patch_size,
        "embed_dim": theirs.hidden_size,
        "depth": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        # timm multiplies and cuts off: half a unit more, and rounding cannot lose one
        "mlp_ratio": (theirs.intermediate_size + 0.5) / theirs.hidden_size,
        "qkv_bias": theirs.qkv_bias,
    }
    if theirs.layer_norm_eps != TIMM_EPS:
        model_args["norm_layer"] = {"_target_": "torch.nn.LayerNorm", "_partial_": True, "eps": theirs.layer_norm_eps}
    return {
        "_target_": "blip2train.model.vision_encoder.timm_vit.TimmVisionEncoder",
        "name": "eva_giant_patch14_clip_224" if eva else "vit_base_patch16_224",
        "pretrained": False,
        "layer": -1,
        "final_norm": False,
        "embed_dim": theirs.hidden_size,
        "dtype": dtype,
        "model_args": model_args,
        "image": image_settings(processor, theirs.image_size),
    }


def image_settings(processor: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Our `ImageSpec` of an image processor; the released models' (CLIP's) values where it says nothing."""
    normalises = processor.get("do_normalize", True)
    resample = processor.get("resample", 3)
    return {
        "_target_": "blip2train.batch.ImageSpec",
        "size": size,
        "mean": list(processor.get("image_mean") or CLIP_MEAN) if normalises else [0.0, 0.0, 0.0],
        "std": list(processor.get("image_std") or CLIP_STD) if normalises else [1.0, 1.0, 1.0],
        "interpolation": _FILTERS.get(resample, "bicubic"),
    }


def processor_notes(processor: Mapping[str, Any], size: int) -> list[str]:
    """Where an image processor does something else than our transform: resize to a square, normalise."""
    if not processor:
        return ["the source has no image processor: CLIP's mean and std and a bicubic resize, as the released models"]
    square = {"height": size, "width": size}
    resample = processor.get("resample", 3)
    notes = {
        f"its image processor resizes to {processor.get('size')}, ours to {square}": (
            processor.get("do_resize", True) and processor.get("size", square) != square
        ),
        f"its image processor resizes by PIL's filter {resample}, ours bicubic": resample not in _FILTERS,
        "its image processor crops the centre, ours does not": bool(processor.get("do_center_crop")),
        f"its image processor rescales by {processor.get('rescale_factor')}, ours by 1/255": (
            abs(processor.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9 or not processor.get("do_rescale", True)
        ),
    }
    return [note for note, found in notes.items() if found]


@dataclass(frozen=True, slots=True)
class VisionNetwork:
    """What transformers must know of our vision encoder.

    Args:
        backbone: timm's network, cut; on the meta device will do.
        image_size: in pixels.
        has_ln_vision: whether our model normalises the image tokens.
        ln_vision_eps: epsilon of that.
    """

    backbone: Any
    image_size: int
    has_ln_vision: bool
    ln_vision_eps: float


def vision_config(network: VisionNetwork, where: str) -> dict[str, Any]:
    """`Blip2VisionConfig`'s values for our encoder.

    Raises:
        ConfigError: the encoder is another network than `Blip2VisionModel`; lists every difference.
    """
    backbone = network.backbone
    problems = _network_problems(network)
    if problems:
        raise ConfigError(
            "transformers' Blip2VisionModel is another network than this vision encoder:\n    "
            + "\n    ".join(problems),
            where=where,
            fix="its plain pre-norm ViT with a class token can hold EVA-CLIP ViT-g and plain ViTs; keep this run in "
            "blip2train's form (to=lavis holds CLIP ViT-L)",
        )
    block = backbone.blocks[0]
    return {
        "hidden_size": backbone.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": network.image_size,
        "patch_size": backbone.patch_embed.patch_size[0],
        "hidden_act": "gelu",
        "layer_norm_eps": block.norm1.eps,
        "qkv_bias": _has_qkv_bias(block.attn),
    }


def _has_qkv_bias(attention: Any) -> bool:
    return attention.qkv.bias is not None or getattr(attention, "q_bias", None) is not None


def _network_problems(network: VisionNetwork) -> list[str]:
    """Every part of the encoder that `Blip2VisionModel` has not, or has otherwise."""
    backbone = network.backbone
    kinds = {type(module).__name__ for module in backbone.modules()}
    epsilons = {module.eps for module in backbone.modules() if isinstance(module, nn.LayerNorm)}
    activations = [block.mlp.act for block in backbone.blocks if hasattr(block.mlp, "act")]
    exact = all(isinstance(act, nn.GELU) and act.approximate == "none" for act in activations)
    names = set(backbone.state_dict())
    known = _known_names(backbone)
    embedding = type(backbone.patch_embed).__name__
    problems = {
        "a norm before the blocks (CLIP's ln_pre): there is no place for it": any(
            n.startswith("norm_pre") for n in names
        ),
        "a final norm besides ln_vision: there is one norm after the blocks": any(n.startswith("norm.") for n in names),
        "no ln_vision: transformers always normalises the image tokens": not network.has_ln_vision,
        "no class token": getattr(backbone, "cls_token", None) is None,
        f"a patch embedding of its own ({embedding}), not one convolution": (
            {name for name in names if name.startswith("patch_embed.")} != _PATCH_EMBEDDING
        ),
        "rotary position embeddings": getattr(backbone, "rope", None) is not None,
        "an activation other than exact GELU": not exact or len(activations) != len(backbone.blocks),
        f"LayerNorms with several epsilons {sorted(epsilons)}": len(epsilons) > 1,
        f"other norms than LayerNorm ({', '.join(sorted(k for k in kinds if 'RmsNorm' in k))})": any(
            "RmsNorm" in kind for kind in kinds
        ),
        f"tensors without a place: {', '.join(sorted(names - known)[:6])}": bool(names - known),
        f"tensors it lacks: {', '.join(sorted(known - names)[:6])}": bool(known - names),
    }
    return [problem for problem, found in problems.items() if found]


def _known_names(backbone: Any) -> set[str]:
    """Names of the tensors of a timm ViT that is `Blip2VisionModel`'s network."""
    leaves = ["attn.qkv.weight"]
    attention = backbone.blocks[0].attn
    if getattr(attention, "q_bias", None) is not None:
        leaves += ["attn.q_bias", "attn.v_bias"]
    elif getattr(attention, "qkv", None) is not None and attention.qkv.bias is not None:
        leaves.append("attn.qkv.bias")
    leaves += [f"{part}.{leaf}" for part in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
               for leaf in ("weight", "bias")]  # fmt: skip
    names = {"cls_token", "pos_embed", *_PATCH_EMBEDDING}
    return names | {f"blocks.{i}.{leaf}" for i in range(len(backbone.blocks)) for leaf in leaves}


def eps_note(network: VisionNetwork) -> list[str]:
    """Our two epsilons against transformers' one."""
    blocks = network.backbone.blocks[0].norm1.eps
    if network.ln_vision_eps == blocks:
        return []
    return [
        f"ln_vision's epsilon is {network.ln_vision_eps}, the encoder's {blocks}; transformers has one for both and "
        f"computes ln_vision with {blocks} (as its own conversion of the released weights does): image tokens differ "
        f"by a relative {abs(network.ln_vision_eps - blocks) / 2:.1e} / variance"
    ]


def name_of(dtype: torch.dtype) -> str:
    """Our yaml's name of a number format, such as "float16"."""
    return str(dtype).removeprefix("torch.")
