"""Pixels -> tiny ViT that sees attributes and places, pre-trained without a word of text.

Implements dense supervision: every patch token names shape, colour, size and texture of the object in its cell and the
cell itself; the class token names background and number of objects. It stands in for CLIP's image pre-training, which
needs text, and for MAE, which needs hours. LAVIS downloads its encoders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2train.batch import IGNORE_INDEX
from blip2train.microworld.render import render
from blip2train.microworld.scene import (
    BACKGROUNDS,
    COLORS,
    MAX_OBJECTS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    WorldSpec,
    sample_scene,
)
from blip2train.microworld.training import Plan
from blip2train.microworld.vit import ConvStem

OBJECTS = (1, 2, 3)
MEAN, STD = 0.5, 0.5
"""Normalisation of pixels scaled to [0, 1]; the encoder's yaml repeats it."""
EMPTY = len(SHAPES)
"""Shape label of a patch whose cell holds no object."""
CELL_OF_PATCH = (0, 1, 1, 2)
"""Which third of the image each of the four patches of a row lies in, mostly."""


def build_vit(size: int = 64) -> nn.Module:
    """The timm ViT that ships: convolutional stem, 16 patches, width 96, three blocks (0.45 M parameters)."""
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=size,
        patch_size=size // 4,
        embed_dim=96,
        depth=3,
        num_heads=4,
        embed_layer=ConvStem,
        num_classes=0,
    )
    return model


class DenseHeads(nn.Module):
    """One linear map per attribute on the ViT's tokens; thrown away after training."""

    def __init__(self, vit: nn.Module, width: int = 96) -> None:
        super().__init__()
        self.vit = vit
        sizes = {"shape": EMPTY + 1, "color": len(COLORS), "size": len(SIZES), "texture": len(TEXTURES)}
        self.patch = nn.ModuleDict({name: nn.Linear(width, count) for name, count in sizes.items()})
        self.patch["where"] = nn.Linear(width, len(POSITIONS))
        self.image = nn.ModuleDict({"bg": nn.Linear(width, len(BACKGROUNDS)), "count": nn.Linear(width, MAX_OBJECTS)})

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """(B, 3, h, w) uint8 -> logits per attribute: (B, 16, classes), and (B, classes) for "bg" and "count"."""
        forward_features: Any = self.vit.forward_features
        tokens_BPI: Tensor = forward_features((pixel_values / 255.0 - MEAN) / STD)
        logits = {name: head(tokens_BPI[:, 1:]) for name, head in self.patch.items()}
        return logits | {name: head(tokens_BPI[:, 0]) for name, head in self.image.items()}


def dense_targets(scene: Scene) -> dict[str, list[int]]:
    """Label of every patch, row by row (IGNORE_INDEX where its cell is empty), and of the image."""
    by_cell = {item.position: item for item in scene.objects}
    cells = [POSITIONS[3 * row + column] for row in CELL_OF_PATCH for column in CELL_OF_PATCH]
    items = [by_cell.get(cell) for cell in cells]
    return {
        "shape": [EMPTY if item is None else SHAPES.index(item.shape) for item in items],
        "color": [IGNORE_INDEX if item is None else COLORS.index(item.color) for item in items],
        "size": [IGNORE_INDEX if item is None else SIZES.index(item.size) for item in items],
        "texture": [IGNORE_INDEX if item is None else TEXTURES.index(item.texture) for item in items],
        "where": [POSITIONS.index(cell) for cell in cells],
        "bg": [BACKGROUNDS.index(scene.background)],
        "count": [len(scene.objects) - 1],
    }


def draw_batch(spec: WorldSpec, scenes: list[Scene]) -> Tensor:
    """Render scenes as (B, 3, size, size) uint8."""
    images = np.stack([render(scene, spec) for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def image_step(heads: DenseHeads, spec: WorldSpec, plan: Plan) -> Callable[[int], Tensor]:
    """Loss of one step: the mean of the attributes' losses, shape counted twice since it is the slow one."""
    many = replace(spec, objects=OBJECTS, seed=plan.seed)
    class_weight = torch.ones(EMPTY + 1)
    class_weight[EMPTY] = 0.1  # most patches are empty

    def loss_of_step(step: int) -> Tensor:
        first = step * plan.batch_size
        scenes = [sample_scene(many, "all", first + index) for index in range(plan.batch_size)]
        logits = heads(draw_batch(spec, scenes))
        labels = [dense_targets(scene) for scene in scenes]
        losses = {}
        for name, values in logits.items():
            target = torch.tensor([label[name] for label in labels]).flatten()
            weight = class_weight if name == "shape" else None
            losses[name] = F.cross_entropy(values.float().flatten(0, -2), target, weight)
        return (sum(losses.values(), losses["shape"])) / (len(losses) + 1)

    return loss_of_step
