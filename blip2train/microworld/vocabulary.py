"""The world's words -> tokenizer folders, and the hash that ties shipped backbones to a world.

Implements one word-level vocabulary in two dressings: BERT's special tokens for the Q-Former (plus [DEC], BLIP-2
section 3.1) and the language models'. LAVIS downloads both tokenizers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from blip2train.microworld.document import END
from blip2train.microworld.language import CAPTION_PROMPT, QUESTION_PROMPT, VOCABULARY
from blip2train.microworld.render import PALETTE, RADII, SHADE, TONES
from blip2train.microworld.scene import WorldSpec

PAD, UNKNOWN = "<pad>", "<unk>"
LANGUAGE_VERSION = 1
"""Raise it when sentences change their meaning or form without a new word."""
RENDER_VERSION = 1
"""Raise it when the same scene is drawn differently."""

LANGUAGE_MODEL_TOKENS = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
QFORMER_TOKENS = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "bos_token": "[DEC]",
}  # fmt: skip


def language_model_ids() -> dict[str, int]:
    """Word -> id for both language models; id 0 is padding."""
    return {word: index for index, word in enumerate((*LANGUAGE_MODEL_TOKENS.values(), *VOCABULARY))}


def save_tokenizer(special: dict[str, str], folder: Path) -> None:
    """Write a word-level tokenizer that transformers' AutoTokenizer loads from `folder`.

    Lower-cases, drops sentence marks and splits on white space, so that "Where is the ring?" is four known words.
    """
    from transformers import PreTrainedTokenizerFast  # seconds of import: only where tokenizers are made

    words = (*special.values(), *VOCABULARY)
    model = WordLevel({word: index for index, word in enumerate(words)}, unk_token=special["unk_token"])
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[?!.,;]"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    wrapped.save_pretrained(folder)


def world_hash(spec: WorldSpec) -> str:
    """Sixteen hex digits over everything a trained backbone takes for granted: words, sentence forms, drawing, size.

    Dials that only choose among known things (objects, textures, held-out pairs, noise, seed ...) leave it unchanged:
    backbones see the whole world.
    """
    known: dict[str, Any] = {
        "vocabulary": VOCABULARY,
        "prompts": (CAPTION_PROMPT, QUESTION_PROMPT, END),
        "language": LANGUAGE_VERSION,
        "render": RENDER_VERSION,
        "drawing": (PALETTE, TONES, RADII, SHADE),
        "size": spec.size,
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
