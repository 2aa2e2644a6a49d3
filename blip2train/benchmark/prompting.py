"""Text prompts through a stage-2 model: (visual prompt, prompt text) -> generated text (paper, section 4.1 and 4.2).

The visual prompt is computed once per image and reused for every question and control. LAVIS tokenizes prompts inside
the model with the padding side left over from training, which has cut questions and scrambled batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from blip2train.batch import EvalItem
from blip2train.data.tokenizer import LanguageModelTokenizer
from blip2train.errors import ConfigError
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.language_model.base import GenerationSettings, check_vocabulary


def visual_prompts(model: Blip2Stage2, items: Sequence[EvalItem], device: torch.device, batch_size: int) -> Tensor:
    """Visual prompts (n, Q, L) of `items`, on `device`."""
    parts = []
    for start in range(0, len(items), batch_size):
        pixels_B3hw = torch.stack([item.image for item in items[start : start + batch_size]])
        parts.append(model.visual_prompt(pixels_B3hw.to(device)))
    return torch.cat(parts)


def generate_texts(
    model: Blip2Stage2,
    tokenizer: LanguageModelTokenizer,
    prompts: Sequence[str],
    visual_prompt: Tensor | None,
    settings: GenerationSettings,
    *,
    device: torch.device,
    batch_size: int,
    max_tokens: int,
) -> list[str]:
    """Continue every prompt after its row of `visual_prompt` (n, Q, L); None asks the language model without an image.

    Answers end where the tokenizer's targets end, unless the settings name another token. Prompts of similar length
    share a batch; the results are in the order of `prompts`.

    Raises:
        ConfigError: the tokenizer has tokens that the language model does not know.
    """
    check_vocabulary(model.language_model, tokenizer.vocab_size)
    ending = settings if settings.end_id is not None else replace(settings, end_id=tokenizer.end_id)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # as the training collator opens a prompt; adapters place padding themselves
        ids_BT, mask_BT = tokenizer.encode_prompt([prompts[row] for row in rows], max_tokens, side="left")
        visual_BQL = None if visual_prompt is None else visual_prompt[torch.tensor(rows, device=visual_prompt.device)]
        generated_BT = model.language_model.generate(visual_BQL, ids_BT.to(device), mask_BT.to(device), ending)
        for row, text in zip(rows, tokenizer.decode(generated_BT.cpu()), strict=True):
            texts[row] = text.strip()
    return texts


def check_template(template: str, fields: Sequence[str], where: str) -> None:
    """Raise `ConfigError` unless `template` can be filled with exactly `fields`."""
    try:
        filled = template.format(**dict.fromkeys(fields, "\0"))
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"prompt template {template!r} cannot be filled: {error!r}", where=where, fix=f"use only {_named(fields)}"
        ) from error
    if filled.count("\0") < len(fields):
        raise ConfigError(f"prompt template {template!r} leaves a field out", where=where, fix=f"use {_named(fields)}")


def _named(fields: Sequence[str]) -> str:
    return ", ".join(f"{{{field}}}" for field in fields)
