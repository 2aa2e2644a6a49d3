"""From a batch to everything the stage-1 losses share: each part is computed once, and only if a loss asks for it.

Section 3.2 of the paper; the only file of the objectives that knows about ranks. LAVIS always runs all four passes and
detaches gathered features only when a process group exists, so its gradient depends on how it was launched; here it
depends on `gather_gradients` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from blip2train import distributed
from blip2train.batch import Stage1Batch
from blip2train.model.autocast import full_precision
from blip2train.objective.similarity import query_text_similarity

if TYPE_CHECKING:
    from blip2train.model.blip2_stage1 import Blip2Stage1
    from blip2train.model.qformer.qformer import ImageKeysValues, QueryStates

MIN_TEMPERATURE = 1e-3
"""Floor of the learned divisor (0.07 at the start): LAVIS never clamps it, and at 0 every similarity is NaN."""


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """What a loss returns: `loss` a scalar with gradient, not yet weighted; `metrics` detached scalars by log key."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


class Objective(Protocol):
    """A stage-1 loss: the stage adds up `weight * loss` over its objectives."""

    weight: float

    def __call__(self, context: Stage1Context) -> ObjectiveOutput: ...


class Stage1Context:
    """One batch seen by the model, lazily: reading an attribute runs the pass behind it, once.

    Shapes: `image_tokens` (B, P, I), `image_features` (B, Q, E), `text_features` (B, E), similarities (B, G) in
    float32 or better and already divided by the temperature, `own_column` (B,), `own_pair` and `same_image` (B, G).

    Read the similarities with gradients enabled: whoever reads first builds the graph that the others use.
    """

    def __init__(
        self,
        model: Blip2Stage1,
        batch: Stage1Batch,
        *,
        gather_gradients: bool,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model = model
        self.batch = batch
        self.gather_gradients = gather_gradients
        self.generator = generator

    @cached_property
    def image_tokens(self) -> Tensor:
        """(B, P, I) from the frozen encoder through the trainable layer norm."""
        return self.model.image_tokens(self.batch.images)

    @cached_property
    def query(self) -> QueryStates:
        """The queries after the image pass, with the keys and values that generation reads."""
        return self.model.encode_image(self.image_tokens)

    @cached_property
    def image_features(self) -> Tensor:
        return self.model.image_features(self.query.hidden)

    @cached_property
    def text_features(self) -> Tensor:
        return self.model.text_features(self.batch.input_ids, self.batch.attention_mask)

    @cached_property
    def temperature(self) -> Tensor:
        """The learned divisor, never below `MIN_TEMPERATURE`."""
        return full_precision(self.model.temperature).clamp(min=MIN_TEMPERATURE)

    @cached_property
    def similarity_i2t(self) -> Tensor:
        """(B, G): this rank's images against the texts of all ranks."""
        texts_GE = distributed.gather(self.text_features, with_grad=self.gather_gradients)
        return query_text_similarity(self.image_features, texts_GE) / self.temperature

    @cached_property
    def similarity_t2i(self) -> Tensor:
        """(B, G): this rank's texts against the images of all ranks."""
        images_GQE = distributed.gather(self.image_features, with_grad=self.gather_gradients)
        return query_text_similarity(images_GQE, self.text_features).T / self.temperature

    @cached_property
    def own_column(self) -> Tensor:
        """(B,) position of each row's own pair among the G gathered ones; every rank brings the same batch size."""
        batch_size = len(self.batch)
        first = distributed.rank() * batch_size
        return torch.arange(first, first + batch_size, device=self.batch.image_ids.device)

    @cached_property
    def own_pair(self) -> Tensor:
        """(B, G) bool: True in the own column alone."""
        columns_G = torch.arange(len(self.batch) * distributed.world_size(), device=self.own_column.device)
        return self.own_column[:, None] == columns_G[None, :]

    @cached_property
    def same_image(self) -> Tensor:
        """(B, G) bool: True where the gathered pair shows the row's own image; holds the own column."""
        image_ids_G = distributed.gather(self.batch.image_ids)
        return self.batch.image_ids[:, None] == image_ids_G[None, :]

    @cached_property
    def same_text(self) -> Tensor:
        """(B, G) bool: True where the gathered pair has the row's own text, token by token; holds the own column."""
        ids_GT, mask_GT = self.gathered_text
        text_GT = ids_GT.masked_fill(~mask_GT, -1)
        return (text_GT[self.own_column, None] == text_GT[None, :]).all(dim=2)

    def images_and_negatives(self, negative_image: Tensor) -> tuple[Tensor | ImageKeysValues, Tensor]:
        """This batch's images with the drawn negatives, and the rows (2B,) in them of the own and the negative ones.

        On one process both are `image_tokens`, or what the image pass has already made of them. Over ranks they are
        (2B, P, I), and the gathering keeps the gradient whatever `gather_gradients` says, as in LAVIS: a negative from
        another rank went through that rank's layer norm, and without its gradient N ranks would not give the gradient
        of one. The whole block travels (1.2 GB per rank in half precision at batch 1680); sending the drawn rows alone
        would give the same sum.

        Args:
            negative_image: (B,) columns among the G gathered images.
        """
        batch_size = len(self.batch)
        own_B = self.own_column - self.own_column[0]
        if distributed.world_size() == 1:
            ran_image_pass = "query" in self.__dict__  # where cached_property keeps it
            return self.query.image if ran_image_pass else self.image_tokens, torch.cat([own_B, negative_image])
        drawn_BPI = distributed.gather(self.image_tokens, with_grad=True)[negative_image]
        return torch.cat([self.image_tokens, drawn_BPI]), torch.cat([own_B, own_B + batch_size])

    @cached_property
    def gathered_text(self) -> tuple[Tensor, Tensor]:
        """Token ids and mask, each (G, T), padded to the longest text over ranks; the padding has id 0."""
        marked_BT = self.batch.input_ids.masked_fill(~self.batch.attention_mask, -1)  # both travel as one tensor
        marked_GT = distributed.gather_padded(marked_BT, dim=1, value=-1)
        return marked_GT.clamp(min=0), marked_GT >= 0


def build_context(
    model: Blip2Stage1, batch: Stage1Batch, gather_gradients: bool, generator: torch.Generator | None = None
) -> Stage1Context:
    """Wrap a batch for the objectives; runs nothing yet.

    Args:
        model: the stage-1 model, on the device of the batch.
        batch: this rank's B pairs.
        gather_gradients: True: N ranks (under DDP's mean) give the gradient of one rank with the whole batch.
            False: features of the other side are constants, those of this rank included, as in LAVIS: image-to-text
            trains the image side only, text-to-image the text side only. Both hold on one process, too.
        generator: source of the sampled negatives, on the batch's device; None uses torch's global one.
    """
    return Stage1Context(model, batch, gather_gradients=gather_gradients, generator=generator)
