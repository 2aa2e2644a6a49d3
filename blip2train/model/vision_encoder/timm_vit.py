"""Any timm ViT as image encoder: uint8 pixels (B, 3, h, w) -> tokens (B, P, I) of a chosen layer; the door to timm.

Implements section 3.1: the second-last layer's output of EVA-CLIP ViT-g/14 or CLIP ViT-L/14; later blocks are removed.
LAVIS can only freeze or train its whole ViT; here the last blocks may train too, and the encoder freezes itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from blip2train.batch import ImageSpec
from blip2train.errors import ConfigError
from blip2train.model.precision import check_dtype, to_dtype
from blip2train.model.vision_encoder.backbone import WHERE, BackboneSpec, build_backbone, check_backbone, image_spec
from blip2train.model.vision_encoder.weights import load_hub_weights, load_weights, read_weights

__all__ = ["TimmVisionEncoder", "image_spec"]

logger = logging.getLogger(__name__)


class TimmVisionEncoder(nn.Module):
    """A timm ViT cut after one block, with its image normalisation inside.

    Args:
        name: timm model name, e.g. "eva_giant_patch14_clip_224", "vit_large_patch14_clip_quickgelu_224" (OpenAI's
            weights need the quickgelu variant; the plain name computes something else without any error).
        image: size, mean and std the encoder wants (`image_spec` asks timm); another size than the weights' resizes
            their position embedding, without antialiasing, as LAVIS does.
        layer: index of the block whose output is used; negative counts from the end. -2 in the paper.
        final_norm: apply the network's final LayerNorm to that output. The paper's layer is used raw.
        pretrained: let timm download the weights that belong to `name`.
        weights: local .safetensors or .pth file instead.
        model_args: further arguments of `timm.create_model`; drop_path_rate among them, which acts where blocks train.
        embed_dim: vision width I that the Q-Former is built for; checked where given.
        dtype: number format of the weights: "float32", "float16" or "bfloat16"; what trains must be "float32".
        trainable_blocks: 0 freezes the encoder, k trains the last k of the blocks that are kept (and the final norm
            where it is), "all" trains everything, embeddings included.
        checkpoint_activations: recompute each block in the backward pass instead of keeping its activations.
        align_corners: resize position embeddings so that the corners of the grids coincide: LAVIS does so with
            CLIP's, not with EVA's.

    Raises:
        ConfigError: not a ViT, a size or a layer it does not have, another width than stated, more blocks to train
            than there are, half precision for what trains, contradicting arguments.
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
        trainable_blocks: int | Literal["all"] = 0,
        checkpoint_activations: bool = False,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        _check_trainable_blocks(trainable_blocks)
        check_dtype("vision_encoder", dtype, trainable=trainable_blocks != 0, where=f"{WHERE}.dtype")
        if pretrained and weights is not None:
            raise ConfigError("both pretrained=true and weights are set", where=WHERE, fix="keep one of them")
        spec = BackboneSpec(name, image.size, layer, final_norm, dict(model_args or {}), embed_dim)
        check_backbone(spec, align_corners)
        state = None if weights is None else read_weights(Path(weights))
        # the numbers drawn for values that the weights replace must not shift what the other parts draw: a run from
        # cached features, which builds no encoder, starts from the same Q-Former
        with torch.random.fork_rng(devices=[], enabled=state is not None or pretrained):
            backbone = build_backbone(spec)
        if state is not None:
            load_weights(backbone, state, align_corners=align_corners, where=str(weights))
        elif pretrained:
            load_hub_weights(backbone, name, align_corners=align_corners)
        else:
            logger.warning("vision encoder %s has random weights (neither `pretrained` nor `weights` is set)", name)
        self.image = image
        self.backbone = backbone.to(to_dtype(dtype, where=f"{WHERE}.dtype"))
        self.embed_dim: int = backbone.embed_dim
        self.num_tokens: int = backbone.patch_embed.num_patches + backbone.num_prefix_tokens
        self.trainable_blocks = trainable_blocks
        self._freeze(checkpoint_activations)
        scale = 255.0
        self.register_buffer("mean", torch.tensor(image.mean).view(1, 3, 1, 1) * scale, persistent=False)
        self.register_buffer("std", torch.tensor(image.std).view(1, 3, 1, 1) * scale, persistent=False)

    @property
    def trainable(self) -> bool:
        """Whether any block trains."""
        return self.trainable_blocks != 0

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of what trains; frozen blocks stay in eval mode."""
        super().train(mode and self.trainable)
        if self.trainable_blocks != "all":
            self.backbone.eval()
            for part in self._trained_parts():
                part.train(mode)
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images; below the first block that trains there is no graph.

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
        pixels_B3hw = pixel_values if self.trainable_blocks == "all" else pixel_values.detach()
        dtype, device = next(self.backbone.parameters()).dtype, pixel_values.device.type
        # the loader hands over pixels with colours side by side, others do not: one layout, one rounding
        normalised_B3hw = ((pixels_B3hw.contiguous() - self.mean) / self.std).to(dtype)
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and dtype == torch.float32):
            tokens_BPI: Tensor = self.backbone.forward_features(normalised_B3hw)
        return tokens_BPI.to(torch.promote_types(tokens_BPI.dtype, torch.float32))

    def _freeze(self, checkpoint_activations: bool) -> None:
        """Leave gradients and training mode to the trained parts alone."""
        kept = len(self.backbone.blocks)
        if self.trainable_blocks != "all" and self.trainable_blocks > kept:
            raise ConfigError(
                f"trainable_blocks is {self.trainable_blocks}, but only {kept} blocks are kept up to the chosen layer",
                where=f"{WHERE}.trainable_blocks",
                fix=f'0 to {kept}, or "all" to train the embeddings too',
            )
        self.requires_grad_(False)
        for part in self._trained_parts():
            part.requires_grad_(True)
        if checkpoint_activations and not self.trainable:
            logger.warning("checkpoint_activations does nothing for a frozen vision encoder, which keeps none")
        self.backbone.set_grad_checkpointing(checkpoint_activations and self.trainable)
        self.train(self.training)

    def _trained_parts(self) -> list[nn.Module]:
        if self.trainable_blocks == "all":
            return [self.backbone]
        first = len(self.backbone.blocks) - self.trainable_blocks
        return [*self.backbone.blocks[first:], self.backbone.norm] if self.trainable else []


def _check_trainable_blocks(trainable_blocks: int | str) -> None:
    counts = isinstance(trainable_blocks, int) and not isinstance(trainable_blocks, bool) and trainable_blocks >= 0
    if trainable_blocks != "all" and not counts:
        raise ConfigError(
            f"trainable_blocks is {trainable_blocks!r}",
            where=f"{WHERE}.trainable_blocks",
            fix='0 (frozen), a number of blocks, or "all"',
        )
