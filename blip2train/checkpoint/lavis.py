"""LAVIS's state dict <-> ours: the rename table, and what LAVIS's files hold besides (tied, constant, left over).

Covers every file that LAVIS 1.0.2 and its later code release or save: both stages, both encoders, fine-tuned or not.
LAVIS loads with `strict=False`; here each name is used, is kept for the way back, or is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blip2train.checkpoint.converted import ConvertedModel
from blip2train.checkpoint.io import STAGE1_ONLY, matches
from blip2train.checkpoint.rename import Rule, translate
from blip2train.errors import CheckpointError

_BLOCK_PARTS = {
    "self_attention.query": "attention.self.query",
    "self_attention.key": "attention.self.key",
    "self_attention.value": "attention.self.value",
    "self_attention.output": "attention.output.dense",
    "self_attention.norm": "attention.output.LayerNorm",
    "cross_attention.query": "crossattention.self.query",
    "cross_attention.key": "crossattention.self.key",
    "cross_attention.value": "crossattention.self.value",
    "cross_attention.output": "crossattention.output.dense",
    "cross_attention.norm": "crossattention.output.LayerNorm",
    "text_ffn.expand": "intermediate.dense",
    "text_ffn.contract": "output.dense",
    "text_ffn.norm": "output.LayerNorm",
    "query_ffn.expand": "intermediate_query.dense",
    "query_ffn.contract": "output_query.dense",
    "query_ffn.norm": "output_query.LayerNorm",
}

_CLIP_BLOCK_PARTS = {
    "norm1.{leaf}": "ln_1.{leaf}",
    "attn.qkv.{leaf}": "attn.in_proj_{leaf}",
    "attn.proj.{leaf}": "attn.out_proj.{leaf}",
    "norm2.{leaf}": "ln_2.{leaf}",
    "mlp.fc1.{leaf}": "mlp.c_fc.{leaf}",
    "mlp.fc2.{leaf}": "mlp.c_proj.{leaf}",
}

MODEL = (
    Rule("temperature", "temp"),
    Rule("ln_vision.{leaf}", "ln_vision.{leaf}"),
    Rule("vision_proj.{leaf}", "vision_proj.{leaf}"),
    Rule("text_proj.{leaf}", "text_proj.{leaf}"),
    Rule("itm_head.{leaf}", "itm_head.{leaf}"),
    Rule("qformer.query_tokens", "query_tokens"),
    Rule("qformer.text_embeddings.word.weight", "Qformer.bert.embeddings.word_embeddings.weight"),
    Rule("qformer.text_embeddings.position.weight", "Qformer.bert.embeddings.position_embeddings.weight"),
    Rule("qformer.embedding_norm.{leaf}", "Qformer.bert.embeddings.LayerNorm.{leaf}"),
    *(
        Rule(f"qformer.blocks.{{i}}.{ours}.{{leaf}}", f"Qformer.bert.encoder.layer.{{i}}.{theirs}.{{leaf}}")
        for ours, theirs in _BLOCK_PARTS.items()
    ),
    Rule("qformer.lm_head.dense.{leaf}", "Qformer.cls.predictions.transform.dense.{leaf}"),
    Rule("qformer.lm_head.norm.{leaf}", "Qformer.cls.predictions.transform.LayerNorm.{leaf}"),
    Rule("qformer.lm_head.bias", "Qformer.cls.predictions.bias"),
)
"""Everything but the backbones and the projection, whose name in LAVIS says which language model it is for."""

VISION = {
    "eva": (Rule("vision_encoder.backbone.{rest}", "visual_encoder.{rest}"),),  # timm kept EVA's names
    "clip": (
        Rule("vision_encoder.backbone.cls_token", "visual_encoder.class_embedding"),
        Rule("vision_encoder.backbone.pos_embed", "visual_encoder.positional_embedding"),
        Rule("vision_encoder.backbone.patch_embed.proj.weight", "visual_encoder.conv1.weight"),
        Rule("vision_encoder.backbone.norm_pre.{leaf}", "visual_encoder.ln_pre.{leaf}"),
        *(
            Rule(f"vision_encoder.backbone.blocks.{{i}}.{ours}", f"visual_encoder.transformer.resblocks.{{i}}.{theirs}")
            for ours, theirs in _CLIP_BLOCK_PARTS.items()
        ),
    ),
}
"""By encoder family: "eva" ViT-g, "clip" ViT-L."""

LANGUAGE_MODELS = ("opt", "t5", "llm")
"""LAVIS's prefixes: OPT, T5, and LLaMA or Vicuna."""

POSITION_IDS = "Qformer.bert.embeddings.position_ids"
TIED = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}
"""Second names of tied parameters, which LAVIS saves as well."""

LEFT_OVER = re.compile(
    r"opt_model\.lm_head\.weight|t5_model\.(encoder|decoder)\.embed_tokens\.weight|llm_model\..*rotary_emb\.inv_freq"
)
"""What LAVIS's removal of frozen parameters misses, since it goes by `named_parameters`: second names and buffers."""

WRAPPER = "module."
"""What torch's DataParallel and DistributedDataParallel put before every name."""

_ADDED_DIMENSIONS = {"cls_token": (0, 0), "pos_embed": (0,)}  # timm's embeddings have a batch, LAVIS's CLIP's have not
_VISION_PREFIX, _LANGUAGE_PREFIX = "vision_encoder.backbone.", "language_model.model."
_EXACT_IN_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(slots=True)
class LavisModel:
    """A LAVIS state dict taken apart.

    Args:
        model: with `facts` for the way back.
        language_model: the language model by transformers' names, where the file holds all of it.
        kind: LAVIS's prefix of the language model, None in stage 1.
        tower: family of the vision encoder in the file, None where there is none.
    """

    model: ConvertedModel
    language_model: dict[str, Tensor] = field(default_factory=dict)
    kind: str | None = None
    tower: str | None = None


def table(kind: str | None, tower: str | None) -> tuple[Rule, ...]:
    """The rename table for one language model and one vision encoder; None leaves their rows out."""
    language: tuple[Rule, ...] = ()
    if kind is not None:
        language = (
            Rule("projection.{leaf}", f"{kind}_proj.{{leaf}}"),
            Rule(_LANGUAGE_PREFIX + "{rest}", f"{kind}_model.{{rest}}"),
        )
    return (*MODEL, *language, *(() if tower is None else VISION[tower]))


def from_lavis(state: Mapping[str, Tensor], *, where: str) -> LavisModel:
    """Take a LAVIS state dict apart and rename it.

    Args:
        state: the file's "model".
        where: the file, for errors.

    Raises:
        CheckpointError: a name with no place, a tied pair that differs, a number format that float32 cannot hold.
    """
    kind = next((kind for kind in LANGUAGE_MODELS if f"{kind}_proj.weight" in state), None)
    tower = _tower(state)
    _check_wrapper(state, where)
    repeated = {POSITION_IDS, *TIED}
    language = [name for name in state if kind is not None and name.startswith(f"{kind}_model.")]
    extra = {name: state[name] for name in language} if all(map(LEFT_OVER.fullmatch, language)) else {}
    rest = {name: tensor for name, tensor in state.items() if name not in repeated and name not in extra}
    ours = translate(rest, table(kind, tower), to="ours", where=where)
    _check_formats(state, where)  # after the names: of a file that is no LAVIS model, those say more
    _check_repeated(state, where)
    to_theirs = dict(zip(ours, rest, strict=True))
    vision = _strip(ours, _VISION_PREFIX)
    for name, added in _ADDED_DIMENSIONS.items():
        if tower == "clip" and name in vision:
            vision[name] = vision[name][(None,) * len(added)]
    if kind is not None:  # the text branch, which some stage-2 files still hold
        unused = [name for name in ours if matches(name, STAGE1_ONLY)]
        extra |= {to_theirs[name]: ours.pop(name) for name in unused}
    language_model = _strip(ours, _LANGUAGE_PREFIX)
    facts = {
        "format": "lavis",
        "language_model": kind,
        "vision_encoder": tower,
        "names": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()},
    }
    trained = {name: tensor.float() for name, tensor in ours.items()}
    return LavisModel(ConvertedModel(trained, vision, extra, facts), language_model, kind, tower)


def to_lavis(parts: LavisModel, *, max_positions: int, where: str) -> dict[str, Tensor]:
    """Put a LAVIS state dict together: the inverse of `from_lavis`, bit by bit, where `facts` say it came from LAVIS.

    Args:
        parts: trained weights in float32. Those of the vision encoder among them replace the encoder's in `vision`.
        max_positions: length of LAVIS's buffer of position ids.
        where: the run, for errors.

    Raises:
        CheckpointError: a tensor that LAVIS has no name for.
    """
    model = parts.model
    state = dict(model.state)
    trained_vision = _strip(state, _VISION_PREFIX)
    ours = state | {_VISION_PREFIX + name: tensor for name, tensor in (model.vision | trained_vision).items()}
    ours |= {_LANGUAGE_PREFIX + name: tensor for name, tensor in parts.language_model.items()}
    for name, added in _ADDED_DIMENSIONS.items():
        if parts.tower == "clip" and _VISION_PREFIX + name in ours:
            ours[_VISION_PREFIX + name] = ours[_VISION_PREFIX + name][added]
    theirs = translate(ours, table(parts.kind, parts.tower), to="theirs", where=where)
    theirs[POSITION_IDS] = torch.arange(max_positions)[None]
    theirs |= {second: theirs[first] for second, first in TIED.items() if first in theirs}
    if model.facts.get("format") != "lavis":
        return theirs
    theirs |= model.extra
    names: Mapping[str, str] = model.facts["names"]
    absent = [name for name in names if name not in theirs]
    if absent:
        raise CheckpointError(
            f"{len(absent)} tensors of the LAVIS file are no longer here: {', '.join(absent[:8])}",
            where=where,
            fix="convert the LAVIS file again; its parts/ folder must stay with the run",
        )
    back = {name: theirs[name].to(getattr(torch, dtype)) for name, dtype in names.items()}
    return back | {second: back[first] for second, first in TIED.items() if second in back}  # one storage, as LAVIS's


def _tower(state: Mapping[str, Tensor]) -> str | None:
    names = [name for name in state if name.startswith("visual_encoder.")]
    if not names:
        return None
    return "clip" if any(name.startswith("visual_encoder.transformer.") for name in names) else "eva"


def _strip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Move what starts with `prefix` out of `state`, without the prefix."""
    names = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state.pop(name) for name in names}


def _check_wrapper(state: Mapping[str, Tensor], where: str) -> None:
    """LAVIS saves the model itself, and loads a file of wrapped names without a word and without a tensor."""
    if state and all(name.startswith(WRAPPER) for name in state):
        raise CheckpointError(
            f"every name starts with {WRAPPER!r}: torch's (Distributed)DataParallel was saved, not the model in it",
            where=where,
            fix="take the prefix off, which LAVIS needs as well: content = torch.load(FILE); content['model'] = "
            f"{{name.removeprefix('{WRAPPER}'): tensor for name, tensor in content['model'].items()}}; "
            "torch.save(content, NEW_FILE)",
        )


def _check_formats(state: Mapping[str, Tensor], where: str) -> None:
    strange = [
        f"{name} ({type(tensor).__name__ if not isinstance(tensor, Tensor) else tensor.dtype})"
        for name, tensor in state.items()
        if not isinstance(tensor, Tensor) or (tensor.dtype not in _EXACT_IN_FLOAT32 and name != POSITION_IDS)
    ]
    if strange:
        raise CheckpointError(
            f"{len(strange)} entries are no tensors that float32 holds exactly: {', '.join(strange[:8])}",
            where=where,
            fix="save the state dict in float32, float16 or bfloat16",
        )


def _check_repeated(state: Mapping[str, Tensor], where: str) -> None:
    """Tied names and the constant buffer are not kept, so they must be what they are taken for."""
    different = [second for second, first in TIED.items() if second in state and not _same(state, second, first)]
    ids = state.get(POSITION_IDS)
    if ids is not None and not torch.equal(ids.cpu(), torch.arange(ids.shape[-1])[None].to(ids.dtype)):
        different.append(POSITION_IDS)
    if different:
        raise CheckpointError(
            f"not what they repeat: {', '.join(different)}",
            where=where,
            fix="this is no BLIP-2 of LAVIS: its decoder is tied to the word embeddings, its positions count from 0",
        )


def _same(state: Mapping[str, Tensor], second: str, first: str) -> bool:
    return first in state and torch.equal(state[second], state[first])


def describe(parts: LavisModel) -> dict[str, Any]:
    """Tensors by part, for the report."""
    counts = {
        "trained": len(parts.model.state),
        "vision encoder": len(parts.model.vision),
        "language model": len(parts.language_model),
    }
    return {name: count for name, count in counts.items() if count}
