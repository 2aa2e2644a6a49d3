"""A sum and a count on every rank -> a mean whose average over ranks is the mean of the whole batch.

Concerns no equation: DDP, FSDP2 and ZeRO average gradients over ranks as if every rank weighed the same. LAVIS's ranks
each take their own mean, so a token on a rank with short texts weighs more than one on a rank with long texts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from blip2train import distributed


@dataclass(frozen=True, slots=True)
class Mean:
    """Turns this rank's sums into its share of a mean.

    Args:
        count: 0-dim, of what the sums run over, 1 at least.
        ranks: how many ranks' shares are averaged afterwards; 1 if each stands for itself.
    """

    count: Tensor
    ranks: int

    def __call__(self, total: Tensor) -> Tensor:
        return total * self.ranks / self.count


def mean_over(count: Tensor, *, global_means: bool) -> Mean:
    """Prepare the mean over `count` things on this rank, or over those of all ranks.

    Args:
        count: 0-dim, on this rank; without gradient. All ranks together may have 0: their mean is then 0.
        global_means: True: the average over ranks of the shares is the mean over the things of all ranks, however they
            are spread. False: each rank's own mean, as in LAVIS.
    """
    ranks = distributed.world_size() if global_means else 1
    everywhere = distributed.reduce_sum(count) if global_means else count.detach()
    return Mean(everywhere.clamp(min=1), ranks)
