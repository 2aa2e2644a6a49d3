"""The smallest float64 model with the methods that the objectives call, and a record of which were called.

Not a Q-Former: its passes are single layers. The objectives' maths must not depend on what is inside.
"""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2train.batch import Stage1Batch
from blip2train.model.qformer.qformer import QueryStates

NUM_QUERIES, WIDTH, VOCAB, DEC_ID = 3, 8, 11, 10


class FakeStage1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.encoder = nn.Linear(12, WIDTH).requires_grad_(False)
        self.ln_vision = nn.LayerNorm(WIDTH)
        self.query_tokens = nn.Parameter(torch.randn(NUM_QUERIES, WIDTH))
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.itm_head = nn.Linear(WIDTH, 2)
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        return self.normalise_tokens(self.raw_tokens(pixel_values))

    def raw_tokens(self, pixel_values: Tensor) -> Tensor:
        self.calls["raw_tokens"] += 1
        tokens_BP12 = pixel_values.flatten(1).reshape(len(pixel_values), -1, 12).to(self.encoder.weight.dtype) / 255
        return self.encoder(tokens_BP12)

    def normalise_tokens(self, raw_tokens: Tensor) -> Tensor:
        self.calls["normalise_tokens"] += 1
        return self.ln_vision(raw_tokens)

    def image_keys_values(self, image_tokens: Tensor) -> Tensor:
        self.calls["image_keys_values"] += 1
        return image_tokens

    def encode_image(self, image_tokens: Tensor) -> QueryStates:
        self.calls["encode_image"] += 1
        return QueryStates(self._read(image_tokens), [], image_tokens)

    def _read(self, image_tokens: Tensor) -> Tensor:
        attention_BQP = (self.query_tokens @ image_tokens.transpose(1, 2)).softmax(dim=-1)
        return self.query_tokens + attention_BQP @ image_tokens

    def image_features(self, hidden: Tensor) -> Tensor:
        self.calls["image_features"] += 1
        return F.normalize(hidden, dim=-1)

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.calls["text_features"] += 1
        return F.normalize(self._text(ids, mask), dim=-1)

    def matching_logits(
        self,
        image_tokens: Tensor,
        ids: Tensor,
        mask: Tensor,
        image_rows: Tensor | None = None,
        more_images: Tensor | None = None,
    ) -> Tensor:
        self.calls["matching_logits"] += 1
        everything = image_tokens if more_images is None else torch.cat([image_tokens, more_images])
        images_BPI = everything if image_rows is None else everything[image_rows]
        queries_BQD = self._read(images_BPI) + self._text(ids, mask)[:, None]
        return self.itm_head(queries_BQD.tanh()).mean(dim=1)

    def generation_logits(self, ids: Tensor, mask: Tensor, query: QueryStates) -> Tensor:
        self.calls["generation_logits"] += 1
        return self.head(self.words(ids) * mask[..., None] + query.hidden.mean(dim=1, keepdim=True))

    def _text(self, ids: Tensor, mask: Tensor) -> Tensor:
        words_BTD = self.words(ids) * mask[..., None]
        return words_BTD.sum(dim=1) / mask.sum(dim=1, keepdim=True)


def fake_model() -> FakeStage1:
    torch.manual_seed(0)
    return FakeStage1().double()


def fake_batch(batch_size: int, *, seed: int = 1, length: int = 5, image_ids: list[int] | None = None) -> Stage1Batch:
    """Random images and texts; row i has between 3 tokens and `length`."""
    generator = torch.Generator().manual_seed(seed)
    lengths_B1 = torch.randint(3, length + 1, (batch_size, 1), generator=generator)
    mask_BT = torch.arange(length)[None, :] < lengths_B1
    ids_BT = torch.randint(1, DEC_ID, (batch_size, length), generator=generator) * mask_BT
    return Stage1Batch(
        pixel_values=torch.randint(0, 256, (batch_size, 3, 4, 4), generator=generator, dtype=torch.uint8),
        input_ids=ids_BT,
        attention_mask=mask_BT,
        image_ids=torch.tensor(image_ids if image_ids is not None else list(range(batch_size))),
        keys=[str(index) for index in range(batch_size)],
    )
