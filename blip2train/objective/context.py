"""From a batch to everything the stage-1 losses share: each part is computed once, and only if a loss asks for it.

Section 3.2 of the paper. LAVIS always runs all four passes and detaches gathered features only when a process group
exists, so its gradient depends on how it was launched; here it depends on `ContextSettings` alone. For the negatives
LAVIS gathers every rank's image tokens, with gradient; here a rank picks its negatives first and fetches those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2train import distributed
from blip2train.batch import Stage1Batch
from blip2train.model.autocast import full_precision
from blip2train.model.qformer.qformer import QueryStates
from blip2train.objective.chunk import chunk_sizes, run_in_chunks
from blip2train.objective.draw import Draw, pair_hash
from blip2train.objective.mean import Mean, mean_over
from blip2train.objective.similarity import query_text_similarity

if TYPE_CHECKING:
    from blip2train.model.blip2_stage1 import Blip2Stage1
    from blip2train.model.qformer.attention import KeysValues
    from blip2train.model.qformer.qformer import ImageKeysValues

MIN_TEMPERATURE = 1e-3
"""Floor of the learned divisor (0.07 at the start): LAVIS never clamps it, and at 0 every similarity is NaN."""


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """What a loss returns: `loss` a scalar with gradient, not yet weighted; `metrics` detached scalars by log key.

    With global means both are this rank's shares: only their average over ranks is the batch's value.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]


class Objective(Protocol):
    """A stage-1 loss: the stage adds up `weight * loss` over its objectives."""

    weight: float

    def __call__(self, context: Stage1Context) -> ObjectiveOutput: ...


@dataclass(frozen=True, slots=True)
class ContextSettings:
    """How ranks and micro-batches share one batch; the losses do not depend on it.

    Args:
        gather_gradients: True: N ranks (under DDP's mean) give the gradient of one rank with the whole batch.
            False: features of the other side are constants, those of this rank included, as in LAVIS: image-to-text
            trains the image side only, text-to-image the text side only. Both hold on one process, too.
        global_means: see `mean_over`.
        micro_batch_size: pairs that a pass with gradient takes at a time (`run_in_chunks`); None takes all.
    """

    gather_gradients: bool = True
    global_means: bool = True
    micro_batch_size: int | None = None


class Stage1Context:
    """One batch seen by the model, lazily: reading an attribute runs the pass behind it, once.

    Shapes: `image_tokens` (B, P, I), `image_features` (B, Q, E), `text_features` (B, E), similarities (B, G) in
    float32 or better and already divided by the temperature, `own_column` (B,), `own_pair` and `same_image` (B, G).
    B may differ between ranks.

    Read the similarities with gradients enabled: whoever reads first builds the graph that the others use. Every rank
    must read the same attributes in the same order, since some of them communicate.
    """

    def __init__(self, model: Blip2Stage1, batch: Stage1Batch, settings: ContextSettings, draw: Draw) -> None:
        self.model = model
        self.batch = batch
        self.settings = settings
        self.draw = draw

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """(B, T) of every rank."""
        return distributed.gather_numbers(*self.batch.input_ids.shape, device=self.batch.input_ids.device)

    @cached_property
    def sizes(self) -> list[int]:
        """B of every rank."""
        return [shape[0] for shape in self.shapes]

    def in_chunks(self, function: Callable[..., Any], *rows: Any) -> Any:
        """Call `function` on this rank's rows, in micro-batches if there are any; see `run_in_chunks`."""
        micro = self.settings.micro_batch_size
        most = len(self.batch) if micro is None else max(self.sizes)
        return run_in_chunks(function, chunk_sizes(len(self.batch), most, micro), *rows)

    def mean_over(self, count: Tensor) -> Mean:
        """How sums over `count` things of this rank become means."""
        return mean_over(count, global_means=self.settings.global_means)

    @cached_property
    def row_share(self) -> float:
        """Factor that makes a mean over this rank's rows its share of the mean over all rows; 1 on equal ranks."""
        return len(self.batch) * len(self.sizes) / sum(self.sizes) if self.settings.global_means else 1.0

    @cached_property
    def raw_tokens(self) -> Tensor:
        """(B, P, I) from the encoder, without gradient if it is frozen."""
        tokens_BPI: Tensor = self.in_chunks(self.model.raw_tokens, self.batch.images)
        return tokens_BPI

    @cached_property
    def image_tokens(self) -> Tensor:
        """(B, P, I): the raw tokens through the trainable layer norm."""
        tokens_BPI: Tensor = self.in_chunks(self.model.normalise_tokens, self.raw_tokens)
        return tokens_BPI

    @cached_property
    def image(self) -> ImageKeysValues:
        """Keys and values of this rank's images: made once, read by the query pass and by matching."""
        return self.model.image_keys_values(self.image_tokens)

    @cached_property
    def query(self) -> QueryStates:
        """The queries after the image pass, with the keys and values that generation reads."""
        hidden_BQD, keys_values = self.in_chunks(self._read_images, self.image)
        return QueryStates(hidden_BQD, keys_values, self.image)

    def _read_images(self, image: ImageKeysValues) -> tuple[Tensor, list[KeysValues]]:
        states = self.model.encode_image(image)
        return states.hidden, states.keys_values

    @cached_property
    def image_features(self) -> Tensor:
        return self.model.image_features(self.query.hidden)

    @cached_property
    def text_features(self) -> Tensor:
        features_BE: Tensor = self.in_chunks(self.model.text_features, self.batch.input_ids, self.batch.attention_mask)
        return features_BE

    @cached_property
    def temperature(self) -> Tensor:
        """The learned divisor, never below `MIN_TEMPERATURE`."""
        return full_precision(self.model.temperature).reshape(()).clamp(min=MIN_TEMPERATURE)

    @cached_property
    def similarity_i2t(self) -> Tensor:
        """(B, G): this rank's images against the texts of all ranks."""
        texts_GE = self._gather(self.text_features, "text features", with_grad=self.settings.gather_gradients)
        return query_text_similarity(self.image_features, texts_GE) / self.temperature

    @cached_property
    def similarity_t2i(self) -> Tensor:
        """(B, G): this rank's texts against the images of all ranks."""
        images_GQE = self._gather(self.image_features, "image features", with_grad=self.settings.gather_gradients)
        return query_text_similarity(images_GQE, self.text_features).T / self.temperature

    @cached_property
    def own_column(self) -> Tensor:
        """(B,) position of each row's own pair among the G gathered ones."""
        first = sum(self.sizes[: distributed.rank()])
        return torch.arange(first, first + len(self.batch), device=self.batch.image_ids.device)

    @cached_property
    def columns(self) -> Tensor:
        """(G,) positions of the gathered pairs."""
        return torch.arange(sum(self.sizes), device=self.own_column.device)

    @cached_property
    def pair_ids(self) -> tuple[Tensor, Tensor]:
        """What this rank's pairs are, (B,), and all ranks', (G,): what their negatives' noise depends on."""
        own_B = pair_hash(self.batch.image_ids, self.batch.input_ids, self.batch.attention_mask)
        return own_B, self._gather(own_B, "pair ids")

    @cached_property
    def own_pair(self) -> Tensor:
        """(B, G) bool: True in the own column alone."""
        return self.own_column[:, None] == self.columns[None, :]

    @cached_property
    def same_image(self) -> Tensor:
        """(B, G) bool: True where the gathered pair shows the row's own image; holds the own column."""
        return self.batch.image_ids[:, None] == self._gather(self.batch.image_ids, "image ids")[None, :]

    @cached_property
    def same_text(self) -> Tensor:
        """(B, G) bool: True where the gathered pair has the row's own text, token by token; holds the own column."""
        ids_GT, mask_GT = self.gathered_text
        text_GT = ids_GT.masked_fill(~mask_GT, -1)
        return (text_GT[self.own_column, None] == text_GT[None, :]).all(dim=2)

    @cached_property
    def gathered_text(self) -> tuple[Tensor, Tensor]:
        """Token ids and mask, each (G, T), padded to the longest text over ranks; the padding has id 0."""
        marked_BT = self.batch.input_ids.masked_fill(~self.batch.attention_mask, -1)  # both travel as one tensor
        longest = max(shape[1] for shape in self.shapes)
        padded_BT = F.pad(marked_BT, (0, longest - marked_BT.shape[1]), value=-1)
        marked_GT = self._gather(padded_BT, "text")
        return marked_GT.clamp(min=0), marked_GT >= 0

    def fetch_images(self, columns: Tensor) -> tuple[ImageKeysValues | None, Tensor]:
        """Bring the chosen images to this rank, as keys and values.

        What travels is the encoder's raw output: in the encoder's number format, and with a gradient only if the
        encoder trains. The layer norm is applied here: N ranks that average its gradient then have that of one rank.

        Args:
            columns: (B,) an image for each row, among the G of all ranks.

        Returns:
            The images that this rank has not (None on one rank), and each row's position (B,) among the own images
            followed by those.
        """
        if len(self.sizes) == 1:
            return None, columns
        raw_UPI, rows_B = distributed.exchange_rows(self.raw_tokens, columns, self.sizes, label="image tokens")
        return self.model.image_keys_values(self.model.normalise_tokens(raw_UPI)), rows_B

    def _gather(self, local: Tensor, label: str, *, with_grad: bool = False) -> Tensor:
        return distributed.gather(local, sizes=self.sizes, with_grad=with_grad, label=label)


def build_context(
    model: Blip2Stage1,
    batch: Stage1Batch,
    *,
    gather_gradients: bool = True,
    global_means: bool = True,
    micro_batch_size: int | None = None,
    draw: Draw | None = None,
) -> Stage1Context:
    """Wrap a batch for the objectives; runs nothing yet.

    Args:
        model: the stage-1 model, on the device of the batch.
        batch: this rank's B pairs.
        gather_gradients: see `ContextSettings`, as the next two.
        global_means: as above.
        micro_batch_size: as above.
        draw: source of the sampled negatives, the same on every rank; None: that of seed 0 and step 0.
    """
    settings = ContextSettings(gather_gradients, global_means, micro_batch_size)
    return Stage1Context(model, batch, settings, Draw(0, 0) if draw is None else draw)
