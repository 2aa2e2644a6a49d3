"""Work and time -> TFLOP/s, and the share of what the device could do (MFU).

The peaks are those of dense matrix products on tensor cores, by the makers' data sheets. Lightning has a table, too; it
mixes them with the doubled figures for sparse weights and does not know the name that an H200 gives itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# words of the device's name -> TFLOP/s in half precision, in TF32; the first that matches counts
_PEAKS: Mapping[str, tuple[float, float]] = {
    "B200": (2250.0, 1125.0),
    "H200 NVL": (835.5, 417.5),
    "H200": (989.4, 494.7),
    "GH200": (989.4, 494.7),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.5, 417.5),
    "H100": (989.4, 494.7),
    "A100": (312.0, 156.0),
    "A800": (312.0, 156.0),
    "L40S": (362.0, 183.0),
    "L40": (181.0, 90.5),
    "L4": (121.0, 60.0),
    "A6000": (154.8, 77.4),
    "A40": (149.7, 74.8),
    "A30": (165.0, 82.0),
    "A10": (125.0, 62.5),
}


@dataclass(frozen=True, slots=True)
class SampleFlops:
    """What the mathematics of a config needs for one sample: forward passes, and backward where weights or inputs ask.

    Args:
        fixed: floating-point operations without text.
        per_token: what each token of text adds.
    """

    fixed: float
    per_token: float

    def of(self, samples: float, tokens: float) -> float:
        """Operations of so many samples with so many tokens of text in all."""
        return self.fixed * samples + self.per_token * tokens


def device_peak(name: str, precision: str) -> float | None:
    """TFLOP/s that a device can reach at most; None if it is not in the table.

    Args:
        name: as the driver states it, such as "NVIDIA H200".
        precision: of the trainer, such as "bf16-mixed"; at "32-true", as torch is set: TF32 or nothing known.
    """
    known = next((peaks for words, peaks in _PEAKS.items() if _has_words(name, words)), None)
    if known is None:
        return None
    if "16" in precision:
        return known[0]
    tf32 = precision.startswith("32") and torch.get_float32_matmul_precision() != "highest"
    return known[1] if tf32 else None


def _has_words(name: str, words: str) -> bool:
    """Whole ones: an A10G and an RTX A4000 are no A10 and no A40."""
    return re.search(rf"\b{re.escape(words)}\b", name, re.IGNORECASE) is not None
