"""Published numbers as data: benchmark -> rows of the paper's tables (arXiv 2301.12597v3).

Recalls and accuracies in percent as printed; CIDEr and BLEU divided by 100, which is the scale of coco-caption and of
our benchmarks. Only what the paper's tables state is here; LAVIS's own re-runs differ (its VQAv2 with OPT-2.7B gives
51.9).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One row of a table: model, its numbers by our metric names, and where they stand."""

    model: str
    values: Mapping[str, float]
    source: str


def _recalls(*values: float) -> dict[str, float]:
    names = [f"{side}_recall@{k}_itm" for side in ("text", "image") for k in (1, 5, 10)]
    return dict(zip(names, values, strict=True))


_FLICKR = "Table 5, Flickr30K 1K zero-shot (from the COCO-fine-tuned model)"
_COCO = "Table 5, COCO 5K fine-tuned"
_KARPATHY = "Table 3, COCO Karpathy test, fine-tuned"
_NOCAPS = "Table 3, NoCaps validation overall, zero-shot after COCO fine-tuning"
_VQA = (
    ("BLIP-2 ViT-L OPT-2.7B", 50.1, 30.2, 33.9),
    ("BLIP-2 ViT-g OPT-2.7B", 53.5, 31.7, 34.6),
    ("BLIP-2 ViT-g OPT-6.7B", 54.3, 36.4, 36.4),
    ("BLIP-2 ViT-L FlanT5-XL", 62.6, 39.4, 44.4),
    ("BLIP-2 ViT-g FlanT5-XL", 63.1, 40.7, 44.2),
    ("BLIP-2 ViT-g FlanT5-XXL", 65.2, 45.9, 44.7),
)

PAPER: Mapping[str, tuple[PaperRow, ...]] = {
    "flickr30k_retrieval": (
        PaperRow("BLIP-2 ViT-L", _recalls(96.9, 100.0, 100.0, 88.6, 97.6, 98.9), _FLICKR),
        PaperRow("BLIP-2 ViT-g", _recalls(97.6, 100.0, 100.0, 89.7, 98.1, 98.9), _FLICKR),
        PaperRow("BLIP", _recalls(96.7, 100.0, 100.0, 86.7, 97.3, 98.7), _FLICKR),
    ),
    "coco_retrieval": (
        PaperRow("BLIP-2 ViT-L", _recalls(83.5, 96.0, 98.0, 66.3, 86.5, 91.8), _COCO),
        PaperRow("BLIP-2 ViT-g", _recalls(85.4, 97.0, 98.5, 68.3, 87.7, 92.6), _COCO),
        PaperRow("BLIP", _recalls(82.4, 95.4, 97.9, 65.1, 86.3, 91.8), _COCO),
    ),
    "coco_caption": (
        PaperRow("BLIP-2 ViT-g OPT-2.7B", {"caption_bleu_4": 0.437, "caption_cider": 1.458}, _KARPATHY),
        PaperRow("BLIP-2 ViT-g OPT-6.7B", {"caption_bleu_4": 0.435, "caption_cider": 1.452}, _KARPATHY),
        PaperRow("BLIP-2 ViT-g FlanT5-XL", {"caption_bleu_4": 0.424, "caption_cider": 1.445}, _KARPATHY),
    ),
    "nocaps": (
        PaperRow("BLIP-2 ViT-g OPT-2.7B", {"caption_cider": 1.197}, _NOCAPS),
        PaperRow("BLIP-2 ViT-g OPT-6.7B", {"caption_cider": 1.210}, _NOCAPS),
        PaperRow("BLIP-2 ViT-g FlanT5-XL", {"caption_cider": 1.216}, _NOCAPS),
    ),
    "vqav2": tuple(PaperRow(model, {"vqa_accuracy": vqa}, "Table 2, VQAv2 val") for model, vqa, _, _ in _VQA),
    "okvqa": tuple(PaperRow(model, {"vqa_accuracy": okvqa}, "Table 2, OK-VQA test") for model, _, okvqa, _ in _VQA),
    "gqa": tuple(PaperRow(model, {"vqa_accuracy": gqa}, "Table 2, GQA test-dev") for model, _, _, gqa in _VQA),
}
"""By benchmark name; a benchmark that is not here is simply shown without published numbers."""
