"""A timm model name -> a ViT cut after one block, checked before anything large is built; random weights.

Implements section 3.1: the second-last layer's output, later blocks removed. LAVIS writes its two ViTs out by hand;
here any ViT of timm will do, and what it cannot do is found on the meta device, where building costs nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import PatchEmbed
from timm.models import beit, eva, vision_transformer
from torch import nn

from blip2train.batch import ImageSpec
from blip2train.errors import ConfigError

WHERE = "model.vision_encoder"
_FAMILIES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva", "beit")


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """What is built: the arguments of `TimmVisionEncoder` that decide the architecture."""

    name: str
    size: int
    layer: int
    final_norm: bool
    model_args: Mapping[str, Any]
    embed_dim: int | None


def image_spec(
    name: str,
    size: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    interpolation: str | None = None,
) -> ImageSpec:
    """Read what the weights called `name` were trained on from timm's own data config; needs no weights, no network.

    Args:
        name: timm model name; its tag counts, since another training may have normalised otherwise.
        size: side of the square input in pixels; None takes the size of the training.
        mean: overrides the data config; None takes its value. So for `std` and `interpolation`.
        std: see `mean`.
        interpolation: see `mean`.

    Raises:
        ConfigError: timm does not know the name or its tag, or its images are not square.
    """
    _check_name(name)
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the tag is unknown
        raise ConfigError(str(error), where=f"{WHERE}.name", fix="give one of timm's tags, or none") from error
    # an architecture that timm has no training of has no data config either: timm then means ImageNet's
    data = resolve_data_config(pretrained_cfg=known.to_dict() if known else {})
    height, width = data["input_size"][-2:]
    if size is None and height != width:
        raise ConfigError(f"{name} wants {height}x{width} pixels", where=f"{WHERE}.image", fix="give a square size")
    return ImageSpec(
        size=height if size is None else size,
        mean=data["mean"] if mean is None else mean,
        std=data["std"] if std is None else std,
        interpolation=data["interpolation"] if interpolation is None else interpolation,
    )


def check_backbone(spec: BackboneSpec, align_corners: bool) -> None:
    """Raise what is wrong with `spec`, having built it without memory on the meta device.

    Args:
        spec: what is to be built.
        align_corners: how its position embedding will be resized; timm offers the choice for one family only.

    Raises:
        ConfigError: not a ViT, a size or a layer it cannot do, another width than stated, contradicting arguments.
    """
    _check_name(spec.name)
    given = spec.model_args.get("img_size", spec.size)
    if given != spec.size:
        raise ConfigError(
            f"model_args.img_size is {given}, image.size is {spec.size}",
            where=WHERE,
            fix="leave img_size out of model_args: image.size is passed on",
        )
    try:
        with torch.device("meta"):
            probe = _create(spec)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        family = timm.model_entrypoint(spec.name).__module__.split(".")[-1]
        if family not in _FAMILIES:  # most of these fail over arguments that only a ViT has
            raise _not_a_vit(spec.name, f"of timm's {family} family") from error
        raise ConfigError(
            f"timm refuses {spec.name}: {error}", where=WHERE, fix="name a ViT, or correct model_args and image.size"
        ) from error
    if not isinstance(probe, vision_transformer.VisionTransformer | eva.Eva | beit.Beit):
        raise _not_a_vit(spec.name, f"a {type(probe).__name__}")
    if align_corners and not isinstance(probe, vision_transformer.VisionTransformer):
        raise ConfigError(
            f"timm cannot resize the position embedding of a {type(probe).__name__} with align_corners=true",
            where=f"{WHERE}.align_corners",
            fix="leave it false, which is what LAVIS does with EVA's; true is for CLIP's",
        )
    _check_size(spec, probe)
    _check_tokens(spec, probe)


def build_backbone(spec: BackboneSpec) -> Any:
    """Build the tower with random weights and take away what lies behind its layer; `spec` has been checked."""
    backbone = _create(spec)
    index = spec.layer % len(backbone.blocks)
    backbone.prune_intermediate_layers([index], prune_norm=not spec.final_norm, prune_head=True)
    return backbone


def _create(spec: BackboneSpec) -> Any:
    return timm.create_model(spec.name, **{"num_classes": 0, "img_size": spec.size, **spec.model_args})


def _not_a_vit(name: str, found: str) -> ConfigError:
    return ConfigError(
        f"{name} is {found}, not a ViT",
        where=f"{WHERE}.name",
        fix="name a model of timm's vision_transformer, eva or beit family",
    )


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=6, cutoff=0.5))
        raise ConfigError(f"timm has no model {name!r}", where=f"{WHERE}.name", fix=f"near it: {near or 'nothing'}")


def _check_size(spec: BackboneSpec, probe: Any) -> None:
    if not isinstance(probe.patch_embed, PatchEmbed):
        return  # a stem of the user's own knows itself which sizes it can take
    patch = probe.patch_embed.patch_size[0]
    if spec.size % patch:
        below = spec.size // patch * patch
        raise ConfigError(
            f"images of {spec.size} pixels cannot be cut into patches of {patch}",
            where=f"{WHERE}.image.size",
            fix=f"a multiple of {patch}, for instance {below or patch} or {below + patch}",
        )


def _check_tokens(spec: BackboneSpec, probe: Any) -> None:
    depth = len(probe.blocks)
    if not isinstance(spec.layer, int):
        raise ConfigError(f"layer is {spec.layer!r}", where=f"{WHERE}.layer", fix="a whole number; the paper uses -2")
    if not -depth <= spec.layer < depth:
        raise ConfigError(
            f"layer is {spec.layer}, but {spec.name} has {depth} blocks",
            where=f"{WHERE}.layer",
            fix=f"{-depth} to {depth - 1}; the paper uses -2, the second-last",
        )
    if spec.final_norm and isinstance(probe.norm, nn.Identity):
        raise ConfigError(
            f"{spec.name} normalises after pooling: its tokens have no final norm",
            where=f"{WHERE}.final_norm",
            fix="set final_norm=false, or model_args.global_pool='' where the weights have one",
        )
    if spec.embed_dim not in (None, probe.embed_dim):
        raise ConfigError(
            f"embed_dim is stated as {spec.embed_dim}, {spec.name} has {probe.embed_dim}",
            where=f"{WHERE}.embed_dim",
            fix=f"set model.vision_encoder.embed_dim={probe.embed_dim}",
        )
