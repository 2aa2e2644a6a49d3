"""(seed, step, pair, other pair) -> random numbers that no generator has to be in step for.

Concerns no equation: the noise of the hard negatives of section 3.2. Every number is a hash of what it stands for, so
that one rank, N ranks and micro-batches draw the very same, whoever brings which pair, on CPU and GPU. LAVIS draws from
each rank's own generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = 52
"""Of each uniform number: so many and a half step fit float64 exactly, and neither 0 nor 1 can come out."""
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True, slots=True)
class Draw:
    """Random numbers of one step.

    Args:
        seed: of the run.
        step: batch index, the same on every rank.
    """

    seed: int
    step: int

    def uniform(self, stream: int, rows: Tensor, columns: Tensor) -> Tensor:
        """Numbers in (0, 1), float64, shaped as `rows` and `columns` broadcast; never 0 and never 1.

        Args:
            stream: a small number per purpose: streams know nothing of each other.
            rows: int64, any: what the numbers are for (`pair_hash`).
            columns: the same.
        """
        bits = _mixed(_mixed(_signed(_key(self.seed, self.step, stream)) + rows) + columns)
        return (_shifted(bits, 64 - _BITS).double() + 0.5) * 2.0**-_BITS

    def gumbel(self, stream: int, rows: Tensor, columns: Tensor) -> Tensor:
        """Standard Gumbel noise between -3.7 and 36.8, float64; arguments as in `uniform`."""
        return -(-self.uniform(stream, rows, columns).log()).log()


def pair_hash(image_ids: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What a pair is, wherever in a batch and however padded: (B,) int64 of its image and its text.

    Args:
        image_ids: (B,) int64.
        input_ids: (B, T).
        attention_mask: (B, T) bool.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    words_BT = _mixed((positions << 32) + input_ids) * attention_mask
    return _mixed(_mixed(image_ids) + words_BT.sum(dim=1))


def _key(*numbers: int) -> int:
    """64 bits out of a few integers, by the splitmix64 finaliser on Python's own integers."""
    key = 0
    for number in numbers:
        key = (key + _GOLDEN * (number + 1)) & _MASK
        for shift, factor in zip((30, 27), _FACTORS, strict=True):
            key = ((key ^ (key >> shift)) * factor) & _MASK
        key ^= key >> 31
    return key


def _mixed(bits: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele, Lea and Flood 2014; constants by Stafford) on int64, which wraps around."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        bits = (bits ^ _shifted(bits, shift)) * _signed(factor)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Right shift that fills with zeros; torch's own repeats the sign."""
    return torch.bitwise_and(bits >> by, (1 << (64 - by)) - 1)


def _signed(bits: int) -> int:
    """The int64 of the same 64 bits."""
    return bits - 2**64 if bits >= 2**63 else bits
