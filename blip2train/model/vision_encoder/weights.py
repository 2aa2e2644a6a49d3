"""A weights file, or timm's hub -> the tensors of a ViT that is already cut, every key accounted for.

The ViTs of section 3.1 come under timm's names, OpenAI's or LAVIS's; files and hub go the same way here. LAVIS loads
non-strictly and in silence; timm antialiases while it resizes a position embedding, which LAVIS does not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from timm.models import eva, load_pretrained, vision_transformer
from timm.models.beit import checkpoint_filter_fn as to_beit_names
from torch import Tensor

from blip2train.errors import CheckpointError, ConfigError
from blip2train.weight_files import read_tensors

# keys of an intact checkpoint that a tower cut after `layer` has no use for
_HEAD_KEY = re.compile(r"^(head|fc_norm|attn_pool|pre_logits|head_dist)\b")
_NORM_KEY = re.compile(r"^norm\.")
_BLOCK_KEY = re.compile(r"^blocks\.(\d+)\.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file or a pickled state dict, of which no code is run.

    Raises:
        CheckpointError: the file is absent, unreadable, or holds something other than tensors by name.
    """
    if not path.is_file():
        raise CheckpointError("no such file", where=str(path), fix="correct model.vision_encoder.weights")
    return read_tensors(path)


def load_weights(backbone: Any, state: dict[str, Any], *, align_corners: bool, where: str) -> None:
    """Load a whole or an equally cut checkpoint into a cut tower.

    Args:
        backbone: timm's ViT, already cut; receives the weights.
        state: tensors by name, in any layout timm knows, or LAVIS's.
        align_corners: how the position embedding is resized, where it must be.
        where: named in an error.

    Raises:
        CheckpointError: a key is missing, unexpected or of another shape; lists all of them.
    """
    backbone.load_state_dict(_fit(backbone, state, align_corners, where))


def load_hub_weights(backbone: Any, name: str, *, align_corners: bool) -> None:
    """Let timm fetch the weights that belong to `name`, and load them as `load_weights` does.

    Raises:
        ConfigError: there are none, or they cannot be fetched.
        CheckpointError: they do not fit.
    """
    fitted = []

    def fit(state: dict[str, Any], model: Any) -> dict[str, Tensor]:
        fitted.append(name)
        return _fit(model, state, align_corners, where=f"pretrained weights of {name}")

    where = "model.vision_encoder.pretrained"
    try:
        load_pretrained(backbone, num_classes=backbone.num_classes, filter_fn=fit)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no pretrained weights for {name}: {error}",
            where=where,
            fix="check the network and the cache folder, or set weights to a local file",
        ) from error
    if not fitted:
        raise ConfigError(
            f"timm reads the weights of {name} in a format of their own, which cannot be accounted for",
            where=where,
            fix="name a model whose weights are a state dict",
        )


def _fit(backbone: Any, state: dict[str, Any], align_corners: bool, where: str) -> dict[str, Tensor]:
    """The tensors of `backbone`, from a checkpoint in which every key is used or known to be cut off."""
    named = _to_timm_names(backbone, state, align_corners, where)
    expected = backbone.state_dict()
    missing = sorted(set(expected) - set(named))
    unexpected = sorted(key for key in set(named) - set(expected) if not _is_cut_off(key, len(backbone.blocks)))
    mismatched = [
        f"{key} {tuple(named[key].shape)} for {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in named and named[key].shape != tensor.shape
    ]
    if missing or unexpected or mismatched:
        raise CheckpointError(
            f"weights do not fit the vision encoder: missing {_list(missing)}; unexpected {_list(unexpected)}; "
            f"other shape {_list(mismatched)}",
            where=where,
            fix="give the weights of model.vision_encoder.name, or the name (and model_args) of these weights",
        )
    return {key: named[key] for key in expected}


def _to_timm_names(backbone: Any, state: dict[str, Any], align_corners: bool, where: str) -> dict[str, Tensor]:
    """Translate a checkpoint of any layout timm knows (OpenAI CLIP's, for one) and fit its position embedding."""
    # antialias=False is how LAVIS resizes position embeddings, so that 364 and 490 pixels reproduce its features
    try:
        match backbone:
            case vision_transformer.VisionTransformer():
                named = vision_transformer.checkpoint_filter_fn(
                    _with_visual_prefix(state), backbone, antialias=False, adapt_layer_scale=True,
                    **_resampling(backbone, align_corners),
                )  # fmt: skip
            case eva.Eva():
                named = eva.checkpoint_filter_fn(state, backbone, antialias=False)
            case _:
                named = to_beit_names(_without_cut_blocks(state, len(backbone.blocks)), backbone, antialias=False)
    # timm's filters take the layout for granted; a file of something else fails in them in any of these ways
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"not the weights of a ViT that timm knows ({type(error).__name__}: {error}); "
            f"its first keys: {', '.join(list(state)[:4])}",
            where=where,
            fix="give the weights of model.vision_encoder.name",
        ) from error
    return {key: tensor for key, tensor in named.items() if isinstance(tensor, Tensor)}


def _resampling(backbone: Any, align_corners: bool) -> dict[str, Any]:
    """How the position embedding is resized: bicubic, but for two families that were trained for another way."""
    name = backbone.pretrained_cfg["architecture"]
    aligned = align_corners or name in ("vit_base_patch16_radio_v3", "vit_huge_patch16_radio_v3")
    return {
        "interpolation": "bilinear" if "flexivit" in name or "radio" in name else "bicubic",
        "align_corners": aligned,
    }


def _with_visual_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """LAVIS's clip_vit_L.pth is OpenAI's image tower without the prefix by which timm knows it."""
    inner = state.get("model", state)
    if "class_embedding" in inner and "conv1.weight" in inner:
        return {f"visual.{key}": tensor for key, tensor in inner.items()}
    return state


def _without_cut_blocks(state: dict[str, Any], num_blocks: int) -> dict[str, Any]:
    """timm's filter for BEiT looks every block's table up in the model, where the cut ones are no more."""
    inner = state.get("model", state)
    inner = inner.get("module", inner)
    return {key: tensor for key, tensor in inner.items() if not _is_cut_block(key, num_blocks)}


def _is_cut_off(key: str, num_blocks: int) -> bool:
    if _BLOCK_KEY.match(key):
        return _is_cut_block(key, num_blocks)
    return _HEAD_KEY.match(key) is not None or _NORM_KEY.match(key) is not None


def _is_cut_block(key: str, num_blocks: int) -> bool:
    block = _BLOCK_KEY.match(key)
    return block is not None and int(block[1]) >= num_blocks


def _list(names: list[str]) -> str:
    return f"{len(names)}" + (f" ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" if names else "")
