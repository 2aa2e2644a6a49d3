"""Images and texts of a retrieval benchmark, encoded once each (paper, appendix: candidates by feature similarity).

An image that occurs in several records (one record per caption) is one candidate with all their captions. LAVIS encodes
the whole set on every rank and keeps image tokens of all images there; here a rank keeps the tokens of its own slice
only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from blip2train.batch import EvalItem
from blip2train.data.caption import clean_caption
from blip2train.data.tokenizer import QFormerTokenizer
from blip2train.distributed import gather_objects, rank, world_size
from blip2train.errors import DataError
from blip2train.model.blip2_stage1 import Blip2Stage1


@dataclass(slots=True)
class LocalImages:
    """This rank's slice: `items` without pixels, `tokens` one (P, I) per item on the CPU, `features` (n, Q, E)."""

    items: list[EvalItem]
    tokens: list[Tensor]
    features: Tensor


@dataclass(slots=True)
class Gallery:
    """The whole benchmark, equal on every rank: N images and M texts, U of them different after cleaning.

    Equal texts are encoded once, so that they tie exactly and not by rounding.

    Args:
        items: N images without pixels, captions merged over the records of one image.
        owner: N pairs (rank, row in that rank's `LocalImages`).
        image_features: (N, Q, E) on the CPU.
        texts: M captions as in the record.
        text_to_image: (M,) index into `items`.
        text_row: (M,) index into the U different texts.
        text_features: (U, E) on the CPU.
        input_ids: (U, T) Q-Former token ids on the CPU.
        attention_mask: (U, T) bool.
    """

    items: list[EvalItem]
    owner: list[tuple[int, int]]
    image_features: Tensor
    texts: list[str]
    text_to_image: Tensor
    text_row: Tensor
    text_features: Tensor
    input_ids: Tensor
    attention_mask: Tensor


def encode_images(
    model: Blip2Stage1,
    items: Iterable[EvalItem],
    device: torch.device,
    batch_size: int,
    cache_dtype: torch.dtype,
    advance: Callable[[int], None],
) -> LocalImages:
    """Encode a stream of images; pixels are dropped after each batch."""
    local = LocalImages([], [], torch.empty(0))
    features: list[Tensor] = []
    for batch in _batches(items, batch_size):
        pixels_B3hw = torch.stack([item.image for item in batch]).to(device)
        tokens_BPI = model.image_tokens(pixels_B3hw)
        features_BQE = model.image_features(model.encode_image(tokens_BPI).hidden)
        features.append(features_BQE.float().cpu())
        local.tokens += tokens_BPI.to(cache_dtype).cpu().unbind(0)
        local.items += [replace(item, image=torch.empty(0, dtype=torch.uint8)) for item in batch]
        advance(len(batch))
    if features:
        local.features = torch.cat(features)
    return local


def build_gallery(
    model: Blip2Stage1,
    local: LocalImages,
    tokenizer: QFormerTokenizer,
    device: torch.device,
    batch_size: int,
    max_tokens: int,
    clean: bool,
    advance: Callable[[int], None],
) -> Gallery:
    """Gather all slices, merge the records of one image, encode every text once (each rank a share).

    Raises:
        DataError: no image, or an image without a caption.
    """
    merged = _merge(local)
    features = torch.cat([part for part in gather_objects([local.features]) if part.numel()])
    offsets = _offsets(len(local.items))
    rows = torch.tensor([offsets[owner] + row for _, (owner, row) in merged])
    items = [item for item, _ in merged]
    texts = [caption for item in items for caption in item.captions]
    text_to_image = torch.tensor([index for index, item in enumerate(items) for _ in item.captions])
    cleaned = [clean_caption(text) for text in texts] if clean else texts
    row_of = {text: row for row, text in enumerate(dict.fromkeys(cleaned))}
    ids_UT, mask_UT = tokenizer(list(row_of), max_tokens)
    return Gallery(
        items=items,
        owner=[owner for _, owner in merged],
        image_features=features[rows],
        texts=texts,
        text_to_image=text_to_image,
        text_row=torch.tensor([row_of[text] for text in cleaned]),
        text_features=_encode_texts(model, ids_UT, mask_UT, device, batch_size, advance),
        input_ids=ids_UT,
        attention_mask=mask_UT,
    )


def similarity(gallery: Gallery, device: torch.device) -> Tensor:
    """Cosine similarity of every image with every text, the best of an image's queries: (N, M) float32 on the CPU."""
    text_EU = gallery.text_features.to(device).T
    queries = gallery.image_features.shape[1]
    rows = max(1, 2**24 // (queries * text_EU.shape[1]))
    chunks = torch.split(gallery.image_features, rows)
    return torch.cat([(chunk.to(device) @ text_EU).amax(dim=1).cpu() for chunk in chunks])[:, gallery.text_row]


def _merge(local: LocalImages) -> list[tuple[EvalItem, tuple[int, int]]]:
    """All ranks' items in record order, one per image id, with the owner of its image tokens."""
    mine = [(row * world_size() + rank(), (rank(), row), item) for row, item in enumerate(local.items)]
    merged: dict[int, tuple[EvalItem, tuple[int, int]]] = {}
    for _, owner, item in sorted(gather_objects(mine), key=lambda entry: entry[0]):
        first, first_owner = merged.setdefault(item.image_id, (item, owner))
        if first is not item:
            extended = replace(first, captions=tuple(dict.fromkeys(first.captions + item.captions)))
            merged[item.image_id] = (extended, first_owner)
    if not merged:
        raise DataError("no image to evaluate", where="benchmark urls", fix="check that the shards hold records")
    for item, _ in merged.values():
        if not item.captions:
            raise DataError(
                "an image without captions cannot be retrieved", where=f"record {item.key}", fix="leave it out"
            )
    return list(merged.values())


def _offsets(local_size: int) -> list[int]:
    sizes = gather_objects([local_size])
    return [sum(sizes[:index]) for index in range(len(sizes))]


def _encode_texts(
    model: Blip2Stage1,
    ids_UT: Tensor,
    mask_UT: Tensor,
    device: torch.device,
    batch_size: int,
    advance: Callable[[int], None],
) -> Tensor:
    shares = torch.arange(len(ids_UT)).chunk(world_size())
    mine = shares[rank()] if rank() < len(shares) else torch.empty(0, dtype=torch.int64)
    parts: list[Tensor] = []
    for rows in torch.split(mine, batch_size) if len(mine) else ():
        ids, mask = trimmed(ids_UT[rows], mask_UT[rows])
        parts.append(model.text_features(ids.to(device), mask.to(device)).float().cpu())
        advance(len(rows))
    return torch.cat(gather_objects(parts))


def trimmed(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the columns at the right end that are padding in every row."""
    length = int(mask.sum(dim=1).max())
    return ids[:, :length], mask[:, :length]


def _batches(items: Iterable[EvalItem], size: int) -> Iterator[Sequence[EvalItem]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
