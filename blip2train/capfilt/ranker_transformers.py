"""Rankers of transformers' CLIP kind: CLIP, SigLIP and what else gives image and text features of one width.

Implements the filter of CapFilt; the paper's is `openai/clip-vit-large-patch14`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blip2train.capfilt.loading import choose_dtype, load_part
from blip2train.capfilt.ranker import Ranking, cosine_scores
from blip2train.errors import ConfigError

_UNBOUNDED = 1 << 20


class TransformersRanker:
    """A model with `get_image_features` and `get_text_features`, and its own processor.

    Args:
        model: name on the hub, or folder.
        device: where it runs.
        dtype: "auto", "float32", "float16" or "bfloat16".

    Raises:
        ConfigError: no such model, or one without these features.
    """

    def __init__(self, model: str, device: torch.device, dtype: str = "auto") -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer  # seconds of import

        self.device = device
        self.dtype = choose_dtype(dtype, device, "ranker.dtype")
        arguments = (model, "ranker.model", "a ranker")
        self.model = load_part(lambda: AutoModel.from_pretrained(model, dtype=self.dtype), *arguments)
        if not (hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")):
            raise ConfigError(
                f"{type(self.model).__name__} gives no image and text features",
                where="ranker.model",
                fix="take a CLIP or SigLIP model, such as openai/clip-vit-large-patch14",
            )
        self.model.to(device).eval()
        self._images = load_part(lambda: AutoImageProcessor.from_pretrained(model), *arguments)
        self._tokenizer = load_part(lambda: AutoTokenizer.from_pretrained(model), *arguments)
        self.max_tokens = _max_tokens(self.model, self._tokenizer)
        # SigLIP was trained on texts padded to their full length, and reads the padding too
        self._reads_padding = self.model.config.model_type.startswith("siglip")
        self._name = model

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor], texts: Sequence[Sequence[str]]) -> Ranking:
        flat = [text for row in texts for text in row]
        if not flat:
            return Ranking([[] for _ in texts], 0)
        pixels_B3hw = self._images(images=list(images), return_tensors="pt")["pixel_values"]
        images_BE = _features(self.model.get_image_features(pixel_values=pixels_B3hw.to(self.device, self.dtype)))
        lengths = [len(ids) for ids in self._tokenizer(flat, verbose=False)["input_ids"]]
        padding = "max_length" if self._reads_padding else "longest"
        encoded = self._tokenizer(
            flat, padding=padding, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        wanted = {"input_ids": encoded["input_ids"].to(self.device)}
        if not self._reads_padding:
            wanted["attention_mask"] = encoded["attention_mask"].to(self.device)
        texts_NE = _features(self.model.get_text_features(**wanted))
        scores = cosine_scores(images_BE, texts_NE, [len(row) for row in texts], self._name)
        return Ranking(scores, sum(length > self.max_tokens for length in lengths))


def _features(output: Any) -> Tensor:
    """(B, E); transformers 5 wraps the features in an output, as the pooled one."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def _max_tokens(model: Any, tokenizer: Any) -> int:
    positions = getattr(getattr(model.config, "text_config", model.config), "max_position_embeddings", _UNBOUNDED)
    return int(min(positions, tokenizer.model_max_length, _UNBOUNDED))
