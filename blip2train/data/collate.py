"""list[Sample] -> Stage1Batch or Stage2Batch: cleaning, prompts and tokens, in the loader's workers.

Implements the text side of both stages (paper sections 3.2 and 3.3). LAVIS tokenizes inside `forward` on the training
process; its FlanT5 stage 2 expects prefix and suffix from the data set, which no released data set has.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from blip2train.batch import Sample, Stage1Batch, Stage2Batch, to_image_id
from blip2train.data.batch_schema import check_samples
from blip2train.data.caption import TextOptions, UnicodeForm, split_prefix_suffix
from blip2train.data.keyed import keyed_generator
from blip2train.data.tokenizer import LanguageModelTokenizer, QFormerTokenizer
from blip2train.errors import ConfigError


class Stage1Collator:
    """Makes the batches of stage 1.

    Args:
        tokenizer: of the Q-Former.
        max_tokens: longest caption with [CLS] and [SEP] (LAVIS: 32).
        clean, max_words, unicode_form: see `TextOptions`.
        image_ids: "dataset": equal ids mean the same image only within a dataset, since many number their images from
            0. "shared": in all of them, for a mixture whose datasets hold the same images under the same ids (COCO's
            captions and its questions).
    """

    def __init__(
        self,
        tokenizer: QFormerTokenizer,
        max_tokens: int = 32,
        clean: bool = True,
        max_words: int | None = 50,
        unicode_form: UnicodeForm | None = None,
        image_ids: Literal["dataset", "shared"] = "dataset",
    ) -> None:
        if image_ids not in ("dataset", "shared"):
            raise ConfigError(f"image_ids={image_ids!r}", where="data.collator.image_ids", fix="one of dataset, shared")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.text = TextOptions(clean, max_words, unicode_form)
        self.image_ids = image_ids

    @property
    def pad_id(self) -> int:
        """What short texts are filled up with, on the right."""
        return self.tokenizer.pad_id

    def __call__(self, samples: list[Sample]) -> Stage1Batch:
        check_samples(samples)
        captions = [self.text.apply(sample.caption) for sample in samples]
        input_ids, attention_mask = self.tokenizer(captions, self.max_tokens)
        return Stage1Batch(
            **_images(samples),
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_ids=torch.tensor([self._image_id(sample) for sample in samples], dtype=torch.int64),
            keys=[sample.key for sample in samples],
        )

    def _image_id(self, sample: Sample) -> int:
        return sample.image_id if self.image_ids == "shared" else to_image_id(f"{sample.dataset}/{sample.image_id}")


class Stage2Collator:
    """Makes the batches of stage 2, for both kinds of language model.

    Args:
        tokenizer: of the language model.
        max_tokens: longest target with its end token, and longest prompt (LAVIS: 32 each).
        prompt: text before every target ("a photo of"); for prefix language modelling, before every prefix.
        prefix_split: cut the caption in two, uniformly between its first word and its middle: the prefix joins the
            prompt, the rest is the target. A caption of one word has an empty prefix. For encoder-decoder models.
        clean, max_words, unicode_form: see `TextOptions`.
        predict_start: count the start token that opens an unprompted caption among the targets, as LAVIS does with OPT;
            False: it is the prompt. Not together with `prompt` or `prefix_split`, whose start is never a target.
        seed: of the splits. A split depends on seed, dataset, the dataset's epoch and key alone: repeatable on resume,
            fresh in every epoch, and the same whatever is done to the image.
    """

    def __init__(
        self,
        tokenizer: LanguageModelTokenizer,
        max_tokens: int = 32,
        prompt: str = "",
        prefix_split: bool = False,
        clean: bool = True,
        max_words: int | None = 50,
        unicode_form: UnicodeForm | None = None,
        predict_start: bool = False,
        seed: int = 0,
    ) -> None:
        if predict_start and (prompt.strip() or prefix_split or tokenizer.start_id is None):
            raise ConfigError(
                f"no start token to predict: prompt {prompt!r}, prefix_split {prefix_split}, "
                f"start token id {tokenizer.start_id}",
                where="data.collator.predict_start",
                fix="false; true is for a decoder-only language model without a caption prompt",
            )
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.prompt = prompt.strip()
        self.prefix_split = prefix_split
        self.text = TextOptions(clean, max_words, unicode_form)
        self.predict_start = predict_start
        self.seed = seed

    @property
    def pad_id(self) -> int:
        """What short texts are filled up with, on the right."""
        return self.tokenizer.pad_id

    def __call__(self, samples: list[Sample]) -> Stage2Batch:
        check_samples(samples)
        prompts, texts = self.split(samples)
        # a target that goes on after a word is spelled as inside a sentence
        separator = self.tokenizer.word_separator
        targets = [f"{separator}{text}" if prompt else text for prompt, text in zip(prompts, texts, strict=True)]
        # the start token opens what a decoder-only model reads; T5 has none, but closes it by its end token
        encode_prompt = self.tokenizer.encode if self.predict_start else self.tokenizer.encode_prompt
        prompt_ids, prompt_mask = encode_prompt(prompts, self.max_tokens, side="right")
        target_ids, target_mask = self.tokenizer.encode(
            targets, self.max_tokens, side="right", add_end=True, add_start=self.predict_start
        )
        return Stage2Batch(
            **_images(samples),
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            target_ids=target_ids,
            target_mask=target_mask,
            keys=[sample.key for sample in samples],
        )

    def split(self, samples: list[Sample]) -> tuple[list[str], list[str]]:
        """Prompt and target text of each sample; what `blip2train show batch` prints."""
        captions = [self.text.apply(sample.caption) for sample in samples]
        if not self.prefix_split:
            return [self.prompt] * len(samples), captions
        parts = [
            split_prefix_suffix(caption.split(), self._generator(sample))
            for sample, caption in zip(samples, captions, strict=True)
        ]
        prompts = [" ".join(filter(None, [self.prompt, *prefix])) for prefix, _ in parts]
        return prompts, [" ".join(suffix) for _, suffix in parts]

    def _generator(self, sample: Sample) -> torch.Generator:
        return keyed_generator(f"{self.seed}/{sample.dataset}/prefix/{sample.epoch}/{sample.key}")


def _images(samples: list[Sample]) -> dict[str, Tensor | None]:
    """Pixels (B, 3, h, w), or the stored tokens (B, P, C) of a feature cache.

    Pixels keep the layout that images are decoded and resized in, colours side by side: turning them costs more than
    all copies together.
    """
    if samples[0].image.ndim == 3:
        pixels = torch.stack([sample.image.permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2)
        return {"pixel_values": pixels, "stored_tokens": None}
    return {"pixel_values": None, "stored_tokens": torch.stack([sample.image for sample in samples])}
