"""Any timm ViT as image encoder: uint8 pixels (B, 3, h, w) -> tokens (B, P, I) of a chosen layer; the door to timm.

Implements section 3.1: the second-last layer's output of EVA-CLIP ViT-g/14 or CLIP ViT-L/14; later blocks are removed.
LAVIS loads its own copies of two ViTs non-strictly and in silence; here every key of a file is accounted for.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import beit, eva, vision_transformer
from torch import Tensor, nn

from blip2train.batch import ImageSpec
from blip2train.errors import CheckpointError, ConfigError
from blip2train.model.precision import to_dtype

logger = logging.getLogger(__name__)

# keys of an intact checkpoint that a tower cut after `layer` has no use for
_HEAD_KEY = re.compile(r"^(head|fc_norm|attn_pool|pre_logits|head_dist)\b")
_NORM_KEY = re.compile(r"^norm\.")
_BLOCK_KEY = re.compile(r"^blocks\.(\d+)\.")


class TimmVisionEncoder(nn.Module):
    """A timm ViT cut after one block, with its image normalisation inside.

    Args:
        name: timm model name, e.g. "eva_giant_patch14_clip_224", "vit_large_patch14_clip_quickgelu_224" (OpenAI's
            weights need the quickgelu variant; the plain name computes something else without any error).
        image: size, mean and std the encoder wants; another size than the name's resizes the position embedding.
        layer: index of the block whose output is used; negative counts from the end. -2 in the paper.
        final_norm: apply the network's final LayerNorm to that output. The paper's layer is used raw.
        pretrained: let timm download the weights that belong to `name`; for another image size timm antialiases while
            it resizes the position embedding, which `weights`, like LAVIS, does not.
        weights: local .safetensors or .pth file instead.
        model_args: further arguments of `timm.create_model`.
        embed_dim: vision width I that the Q-Former is built for; checked where given.
        dtype: number format of the weights: "float32", "float16" or "bfloat16".

    Raises:
        ConfigError: not a ViT, a layer it does not have, another width than stated, contradicting arguments.
        CheckpointError: `weights` is unreadable, or its keys are not those of the model.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        image: ImageSpec,
        layer: int = -2,
        final_norm: bool = False,
        pretrained: bool = False,
        weights: str | None = None,
        model_args: Mapping[str, Any] | None = None,
        embed_dim: int | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.image = image
        backbone = _build(name, image, pretrained, weights, dict(model_args or {}))
        index = _block_index(layer, len(backbone.blocks), name)
        if final_norm and isinstance(backbone.norm, nn.Identity):
            raise ConfigError(
                f"{name} normalises after pooling: its tokens have no final norm",
                where="model.vision_encoder.final_norm",
                fix="set final_norm=false, or model_args.global_pool='' where the weights have one",
            )
        state = None if weights is None else _to_timm_names(backbone, _read(Path(weights)))
        backbone.prune_intermediate_layers([index], prune_norm=not final_norm, prune_head=True)
        if state is not None:
            _load(backbone, state, weights)
        elif not pretrained:
            logger.warning("vision encoder %s has random weights (neither `pretrained` nor `weights` is set)", name)
        self.backbone = backbone.to(to_dtype(dtype, where="model.vision_encoder.dtype"))
        self.embed_dim: int = backbone.embed_dim
        if embed_dim is not None and embed_dim != self.embed_dim:
            raise ConfigError(
                f"embed_dim is stated as {embed_dim}, {name} has {self.embed_dim}",
                where="model.vision_encoder.embed_dim",
                fix=f"set model.vision_encoder.embed_dim={self.embed_dim}",
            )
        self.num_tokens: int = backbone.patch_embed.num_patches + backbone.num_prefix_tokens
        scale = 255.0
        self.register_buffer("mean", torch.tensor(image.mean).view(1, 3, 1, 1) * scale, persistent=False)
        self.register_buffer("std", torch.tensor(image.std).view(1, 3, 1, 1) * scale, persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Weights in half precision compute in that precision whatever autocast says; float32 weights follow autocast.

        Args:
            pixel_values: (B, 3, h, w) uint8, h = w = `image.size`.

        Returns:
            (B, P, I) in float32 or better.

        Raises:
            ConfigError: images of another size.
        """
        size = self.image.size
        if tuple(pixel_values.shape[-2:]) != (size, size):
            height, width = pixel_values.shape[-2:]
            raise ConfigError(
                f"images of {height}x{width} pixels, but the vision encoder was built for {size}x{size}",
                where="the batch's pixel_values against model.vision_encoder.image.size",
                fix=f"let the transform read model.vision_encoder.image, or set its size to {height}",
            )
        dtype, device = next(self.backbone.parameters()).dtype, pixel_values.device.type
        normalised_B3hw = ((pixel_values - self.mean) / self.std).to(dtype)
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and dtype == torch.float32):
            tokens_BPI: Tensor = self.backbone.forward_features(normalised_B3hw)
        return tokens_BPI.to(torch.promote_types(tokens_BPI.dtype, torch.float32))


def _build(name: str, image: ImageSpec, pretrained: bool, weights: str | None, model_args: dict[str, Any]) -> Any:
    where = "model.vision_encoder"
    if pretrained and weights is not None:
        raise ConfigError("both pretrained=true and weights are set", where=where, fix="keep one of them")
    if model_args.get("img_size", image.size) != image.size:
        raise ConfigError(
            f"model_args.img_size is {model_args['img_size']}, image.size is {image.size}",
            where=where,
            fix="leave img_size out of model_args: image.size is passed on",
        )
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:12])
        raise ConfigError(f"timm has no model {name!r}", where=f"{where}.name", fix=f"near it: {near or 'nothing'}")
    try:
        backbone = timm.create_model(
            name, pretrained=pretrained, **{"num_classes": 0, "img_size": image.size, **model_args}
        )
    except (TypeError, AssertionError) as error:
        raise ConfigError(
            f"timm refuses {name}: {error}", where=where, fix="name a ViT, or correct model_args"
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ConfigError(
            f"no pretrained weights for {name}: {error}",
            where=f"{where}.pretrained",
            fix="check the network and the cache folder, or set weights to a local file",
        ) from error
    if not isinstance(backbone, vision_transformer.VisionTransformer | eva.Eva | beit.Beit):
        raise ConfigError(
            f"{name} is a {type(backbone).__name__}, not a ViT",
            where=f"{where}.name",
            fix="name a model of timm's vision_transformer, eva or beit family",
        )
    return backbone


def _block_index(layer: int, depth: int, name: str) -> int:
    index = layer if layer >= 0 else depth + layer
    if not 0 <= index < depth:
        raise ConfigError(
            f"layer is {layer}, but {name} has {depth} blocks",
            where="model.vision_encoder.layer",
            fix=f"{-depth} to {depth - 1}; the paper uses -2, the second-last",
        )
    return index


def _to_timm_names(backbone: Any, state: dict[str, Any]) -> dict[str, Tensor]:
    """Translate a checkpoint of any layout timm knows (OpenAI CLIP's, for one) and fit its position embedding."""
    # antialias=False is how LAVIS resizes position embeddings, so that 364 and 490 pixels reproduce its features
    match backbone:
        case vision_transformer.VisionTransformer():
            named = vision_transformer.checkpoint_filter_fn(state, backbone, antialias=False)
        case eva.Eva():
            named = eva.checkpoint_filter_fn(state, backbone, antialias=False)
        case _:
            named = beit.checkpoint_filter_fn(state, backbone, antialias=False)
    return dict(named)


def _load(backbone: Any, state: dict[str, Tensor], weights: str | None) -> None:
    """Load a whole or an equally cut checkpoint into the cut tower; every key is used or known to be cut off."""
    expected = set(backbone.state_dict())
    missing = sorted(expected - set(state))
    unexpected = sorted(key for key in set(state) - expected if not _is_cut_off(key, len(backbone.blocks)))
    mismatched = [
        f"{key} {tuple(state[key].shape)} for {tuple(tensor.shape)}"
        for key, tensor in backbone.state_dict().items()
        if key in state and state[key].shape != tensor.shape
    ]
    if missing or unexpected or mismatched:
        raise CheckpointError(
            f"weights do not fit the vision encoder: missing {_list(missing)}; unexpected {_list(unexpected)}; "
            f"other shape {_list(mismatched)}",
            where=str(weights),
            fix="give the weights of model.vision_encoder.name, or the name (and model_args) of these weights",
        )
    backbone.load_state_dict({key: state[key] for key in expected})


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError("no such file", where=str(path), fix="correct model.vision_encoder.weights")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise CheckpointError(
            f"not a readable weights file: {error}",
            where=str(path),
            fix="give a .safetensors file or a plain state dict",
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"holds a {type(state).__name__}, not a state dict", where=str(path), fix="save model.state_dict() instead"
        )
    return state


def _is_cut_off(key: str, num_blocks: int) -> bool:
    block = _BLOCK_KEY.match(key)
    if block is not None:
        return int(block[1]) >= num_blocks
    return _HEAD_KEY.match(key) is not None or _NORM_KEY.match(key) is not None


def _list(names: list[str]) -> str:
    return f"{len(names)}" + (f" ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" if names else "")
