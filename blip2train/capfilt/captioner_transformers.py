"""Any captioner of transformers' BLIP kind: BLIP, BLIP-2, InstructBLIP, GIT, an encoder with a decoder.

Implements the captioner of CapFilt for published models; the paper's is `Salesforce/blip-image-captioning-large`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from blip2train.capfilt.captioner import CaptionSettings, group
from blip2train.capfilt.loading import choose_dtype, load_part
from blip2train.errors import ConfigError

BLIP_PROMPT = "a picture of"
_IMAGE_IN_TEXT = ("blip-2", "instructblip")
_KINDS = ("blip", *_IMAGE_IN_TEXT, "git", "vision-encoder-decoder")


class TransformersCaptioner:
    """A model that transformers knows as image-text-to-text, with its own processor.

    Args:
        model: name on the hub, or folder.
        settings: how to write.
        device: where it runs.
        dtype: "auto", "float32", "float16" or "bfloat16".

    Raises:
        ConfigError: no such model, or none that captions.
    """

    def __init__(self, model: str, settings: CaptionSettings, device: torch.device, dtype: str = "auto") -> None:
        from transformers import AutoModelForImageTextToText  # seconds of import: only where a model is wanted

        self.device = device
        self.dtype = choose_dtype(dtype, device, "captioner.dtype")
        self.model = load_part(
            lambda: AutoModelForImageTextToText.from_pretrained(model, dtype=self.dtype),
            *(model, "captioner.model", "a captioner"),
        )
        _check_kind(self.model.config.model_type, settings)
        self.model.to(device).eval()
        self._processor, self._tokenizer = _processors(model)
        self.settings = _with_prompt(self.model.config.model_type, settings)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor], keys: Sequence[str]) -> list[list[str]]:
        inputs = self._inputs(images)
        options = self._options()
        choose = self.settings.choose(keys)
        if choose is not None:
            # transformers repeats the rows of an image only where it samples; `choose` leaves it nothing to draw
            options |= {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "logits_processor": [choose]}
        ids_RT = self.model.generate(**inputs, **options)
        texts = self._tokenizer.batch_decode(ids_RT, skip_special_tokens=True)
        return group([self.settings.without_prompt(text) for text in texts], self.settings.num_captions)

    def _options(self) -> dict[str, Any]:
        """Everything that a checkpoint's own generation defaults could set otherwise."""
        settings = self.settings
        return {
            "do_sample": False,
            "num_beams": settings.num_beams,
            "num_return_sequences": settings.num_captions,
            "min_new_tokens": settings.min_tokens,
            "max_new_tokens": settings.max_tokens,
            "repetition_penalty": settings.repetition_penalty,
            "length_penalty": 1.0,
            "no_repeat_ngram_size": 0,
        }

    def _inputs(self, images: Sequence[Tensor]) -> dict[str, Any]:
        # BLIP-2 keeps the places of its image in the text
        asks = self.settings.prompt or self.model.config.model_type in _IMAGE_IN_TEXT
        prompt = {"text": [self.settings.prompt] * len(images)} if asks else {}
        encoded = self._processor(images=list(images), return_tensors="pt", **prompt)
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in encoded.items()
            if name != "token_type_ids"  # of BERT's tokenizer; no captioner reads them
        }


def _processors(model: str) -> tuple[Any, Any]:
    """What prepares images and prompts, and what decodes; some models come without a processor that joins the two."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    processor = load_part(
        lambda: AutoProcessor.from_pretrained(model), model, "captioner.model", "a captioner's processor"
    )
    if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
        return processor, processor.tokenizer
    images = load_part(
        lambda: AutoImageProcessor.from_pretrained(model), model, "captioner.model", "an image processor"
    )
    tokenizer = load_part(lambda: AutoTokenizer.from_pretrained(model), model, "captioner.model", "a tokenizer")
    return images, tokenizer


def _check_kind(kind: str, settings: CaptionSettings) -> None:
    if kind not in _KINDS:
        raise ConfigError(
            f"a {kind} model, which is asked in a way of its own",
            where="captioner.model",
            fix=f"take a model of one of the kinds {', '.join(_KINDS)}, or a run folder",
        )
    if kind == "instructblip" and not settings.prompt:
        raise ConfigError(
            "InstructBLIP without an instruction",
            where="captioner.settings.prompt",
            fix='for instance "A short image caption:"',
        )


def _with_prompt(kind: str, settings: CaptionSettings) -> CaptionSettings:
    """The model's own prompt where none is given; BLIP was trained with one."""
    if settings.prompt is None:
        return replace(settings, prompt=BLIP_PROMPT if kind == "blip" else "")
    if settings.prompt and kind == "vision-encoder-decoder":
        raise ConfigError(f"{kind} takes no prompt", where="captioner.settings.prompt", fix='set it to ""')
    return settings
