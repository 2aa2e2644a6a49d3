"""Raw caption or question -> the text a tokenizer sees, and the split of a caption into prefix and suffix.

Implements LAVIS's `pre_caption` and `pre_question`, and the split rule the BLIP-2 authors gave for encoder-decoder LLMs
(paper section 3.2, "prefix language modeling"). LAVIS ships no splitter, so its FlanT5 stage 2 cannot run as released.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

import torch

_PUNCTUATION = '.!"()*#:;~'
_TO_SPACE = str.maketrans(_PUNCTUATION, " " * len(_PUNCTUATION))
_TO_NOTHING = str.maketrans("", "", _PUNCTUATION)
_WHITESPACE_RUN = re.compile(r"\s{2,}")

T = TypeVar("T")


def clean_caption(text: str, max_words: int = 50) -> str:
    """Lower-case, turn ten punctuation marks into spaces, collapse runs of whitespace, keep `max_words` words.

    A single tab, line break or no-break space inside the text stays, as in LAVIS. Text without a word gives "".
    """
    spaced = _WHITESPACE_RUN.sub(" ", text.lower().translate(_TO_SPACE))
    return _first_words(spaced.rstrip("\n").strip(" "), max_words)


def clean_question(text: str, max_words: int = 50) -> str:
    """Lower-case, delete the same punctuation ("?" stays), keep `max_words` words; inner spaces are left alone."""
    return _first_words(text.lower().translate(_TO_NOTHING).rstrip(" "), max_words)


def split_prefix_suffix(words: Sequence[T], generator: torch.Generator) -> tuple[list[T], list[T]]:
    """Cut words (or token ids) into what the encoder reads and what the decoder must say.

    The prefix length is uniform over 1 .. len // 2, so neither side is ever empty. With fewer than two words there is
    nothing to cut: the prefix is empty and everything is target.
    """
    if len(words) < 2:
        return [], list(words)
    cut = 1 + int(torch.randint(len(words) // 2, (), generator=generator))
    return list(words[:cut]), list(words[cut:])


def _first_words(text: str, max_words: int) -> str:
    words = text.split(" ")
    return text if len(words) <= max_words else " ".join(words[:max_words])
