"""list[Sample] -> Stage1Batch or Stage2Batch: cleaning, prompts and tokens, in the loader's workers.

Implements the text side of both stages (paper sections 3.2 and 3.3). LAVIS tokenizes inside `forward` on the training
process; its FlanT5 stage 2 expects prefix and suffix from the data set, which no released data set has.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from blip2train.batch import Sample, Stage1Batch, Stage2Batch
from blip2train.data.caption import clean_caption, split_prefix_suffix
from blip2train.data.tokenizer import LanguageModelTokenizer, QFormerTokenizer
from blip2train.errors import ConfigError


class Stage1Collator:
    """Makes the batches of stage 1.

    Args:
        tokenizer: of the Q-Former.
        max_tokens: longest caption with [CLS] and [SEP] (LAVIS: 32).
        clean: apply LAVIS's caption cleaning.
    """

    def __init__(self, tokenizer: QFormerTokenizer, max_tokens: int = 32, clean: bool = True) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.clean = clean

    def __call__(self, samples: list[Sample]) -> Stage1Batch:
        input_ids, attention_mask = self.tokenizer(_captions(samples, self.clean), self.max_tokens)
        return Stage1Batch(
            **_images(samples),
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_ids=torch.tensor([sample.image_id for sample in samples], dtype=torch.int64),
            keys=[sample.key for sample in samples],
        )


class Stage2Collator:
    """Makes the batches of stage 2, for both kinds of language model.

    Args:
        tokenizer: of the language model.
        max_tokens: longest target with its end token, and longest prompt (LAVIS: 32 each).
        prompt: text before every target ("a photo of"); for prefix language modelling, before every prefix.
        prefix_split: cut the caption in two, uniformly between its first word and its middle: the prefix joins the
            prompt, the rest is the target. A caption of one word has an empty prefix. For encoder-decoder models.
        clean: apply LAVIS's caption cleaning.
        predict_start: count the start token that opens an unprompted caption among the targets, as LAVIS does with OPT;
            False: it is the prompt. Not together with `prompt` or `prefix_split`, whose start is never a target.
        seed: of the splits. A split depends on seed, key, caption and augmented pixels alone: repeatable on resume, and
            fresh in every epoch, since the augmentation is.
    """

    def __init__(
        self,
        tokenizer: LanguageModelTokenizer,
        max_tokens: int = 32,
        prompt: str = "",
        prefix_split: bool = False,
        clean: bool = True,
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
        self.clean = clean
        self.predict_start = predict_start
        self.seed = seed

    def __call__(self, samples: list[Sample]) -> Stage2Batch:
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
        captions = _captions(samples, self.clean)
        if not self.prefix_split:
            return [self.prompt] * len(samples), captions
        parts = [
            split_prefix_suffix(caption.split(), self._generator(sample))
            for sample, caption in zip(samples, captions, strict=True)
        ]
        prompts = [" ".join(filter(None, [self.prompt, *prefix])) for prefix, _ in parts]
        return prompts, [" ".join(suffix) for _, suffix in parts]

    def _generator(self, sample: Sample) -> torch.Generator:
        key = zlib.crc32(f"{self.seed}/{sample.key}/{sample.caption}".encode())
        return torch.Generator().manual_seed(zlib.crc32(sample.image[:, ::8, ::8].numpy().tobytes(), key))


def _captions(samples: list[Sample], clean: bool) -> list[str]:
    return [clean_caption(sample.caption) if clean else sample.caption for sample in samples]


def _images(samples: list[Sample]) -> dict[str, Tensor | None]:
    """Pixels (B, 3, h, w), or the stored tokens (B, P, C) of a feature cache."""
    stacked = torch.stack([sample.image for sample in samples])
    is_pixels = stacked.ndim == 4
    return {"pixel_values": stacked if is_pixels else None, "stored_tokens": None if is_pixels else stacked}
