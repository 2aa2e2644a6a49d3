"""ITM re-ranking of the best candidates by similarity (paper, section 4.4 and appendix: k = 128, both directions).

Each (image, text) pair that either direction wants is scored once, on the rank that holds the image. LAVIS scores the
two directions apart and so computes shared pairs twice; its final score is the match logit plus the similarity, which
`add_similarity` keeps or drops.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blip2train.benchmark.gallery import Gallery, LocalImages, trimmed
from blip2train.distributed import gather_objects, rank
from blip2train.model.blip2_stage1 import Blip2Stage1

IMAGES_PER_GROUP = 16


def candidates(similarity_NM: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` best texts of each image and the `top_k` best images of each text.

    Returns:
        Two (N, M) bool masks: image to text, text to image.
    """
    images, texts = similarity_NM.shape
    i2t_NM = torch.zeros_like(similarity_NM, dtype=torch.bool)
    i2t_NM.scatter_(1, similarity_NM.topk(min(top_k, texts), dim=1).indices, True)
    t2i_NM = torch.zeros_like(similarity_NM, dtype=torch.bool)
    t2i_NM.scatter_(0, similarity_NM.topk(min(top_k, images), dim=0).indices, True)
    return i2t_NM, t2i_NM


def reranked(similarity_NM: Tensor, matching_NM: Tensor, chosen_NM: Tensor, add_similarity: bool) -> Tensor:
    """Scores (N, M) whose order is: chosen pairs by matching score, then the others by similarity."""
    scores_NM = matching_NM + similarity_NM if add_similarity else matching_NM
    # the smallest shift that separates the two: a large constant would round small similarity differences away
    shift = scores_NM[chosen_NM].min() - similarity_NM.max() - 1.0
    return torch.where(chosen_NM, scores_NM, similarity_NM + shift)


def different_pairs(gallery: Gallery, wanted_NM: Tensor) -> Tensor:
    """The wanted pairs as (N, U): a text that several images have is wanted once."""
    counts_NU = torch.zeros(len(gallery.items), len(gallery.input_ids), dtype=torch.int32)
    return counts_NU.index_add_(1, gallery.text_row, wanted_NM.to(torch.int32)) > 0


def matching_scores(
    model: Blip2Stage1,
    local: LocalImages,
    gallery: Gallery,
    wanted_NU: Tensor,
    device: torch.device,
    batch_size: int,
    advance: Callable[[int], None],
) -> Tensor:
    """ITM match logit of every pair in `different_pairs`, zero elsewhere: (N, M) float32, equal on every rank.

    Images are taken in groups: their cross-attention keys and values are computed once for all their texts, and within
    a group texts of equal length share a batch.
    """
    mine = [image for image, (owner, _) in enumerate(gallery.owner) if owner == rank()]
    scored: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(mine), IMAGES_PER_GROUP):
        group = torch.tensor(mine[start : start + IMAGES_PER_GROUP])
        tokens_NPI = torch.stack([local.tokens[gallery.owner[image][1]] for image in group.tolist()])
        image = model.qformer.image_keys_values(tokens_NPI.to(device, model.temperature.dtype))
        pairs_X2 = wanted_NU[group].nonzero()
        lengths_X = gallery.attention_mask.sum(dim=1)[pairs_X2[:, 1]]
        for pairs_B2 in torch.split(pairs_X2[lengths_X.argsort(stable=True)], batch_size):
            ids_BT, mask_BT = trimmed(gallery.input_ids[pairs_B2[:, 1]], gallery.attention_mask[pairs_B2[:, 1]])
            rows_B = pairs_B2[:, 0].to(device)
            logits_B2 = model.matching_logits(image, ids_BT.to(device), mask_BT.to(device), rows_B)
            scored.append((torch.stack([group[pairs_B2[:, 0]], pairs_B2[:, 1]]), logits_B2[:, 1].float().cpu()))
            advance(len(pairs_B2))
    matching_NU = torch.zeros(wanted_NU.shape)
    for (image_B, text_B), scores_B in gather_objects(scored):
        matching_NU[image_B, text_B] = scores_B
    return matching_NU[:, gallery.text_row]
