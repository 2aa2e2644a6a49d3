"""Raw caption or question -> the text a tokenizer sees, and the split of a caption into prefix and suffix.

Implements LAVIS's `pre_caption` and `pre_question`, and the split rule the BLIP-2 authors gave for encoder-decoder LLMs
(paper section 3.2, "prefix language modeling"). LAVIS ships no splitter, so its FlanT5 stage 2 cannot run as released.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch

from blip2train.errors import ConfigError

UnicodeForm = Literal["NFC", "NFD", "NFKC", "NFKD"]

_PUNCTUATION = '.!"()*#:;~'
_TO_SPACE = str.maketrans(_PUNCTUATION, " " * len(_PUNCTUATION))
_TO_NOTHING = str.maketrans("", "", _PUNCTUATION)
_WHITESPACE_RUN = re.compile(r"\s{2,}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What is done to a caption before it is tokenized; part of every collator's settings.

    Args:
        clean: LAVIS's caption cleaning (`clean_caption`); False leaves the text as written.
        max_words: words that are kept, cleaned or raw; None keeps all (tokens are limited anyway).
        unicode_form: normalise to this form first, so that é is one thing however it was typed. None, as in LAVIS,
            leaves that to the tokenizer: BERT's does, GPT-2's (OPT) does not.
    """

    clean: bool = True
    max_words: int | None = 50
    unicode_form: UnicodeForm | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.clean, bool):
            raise ConfigError(f"clean={self.clean!r}", where="data.collator.clean", fix="true or false")
        if self.max_words is not None and self.max_words < 1:
            raise ConfigError(
                f"max_words={self.max_words}", where="data.collator.max_words", fix="1 or more, or null for all words"
            )
        if self.unicode_form is not None and self.unicode_form not in get_args(UnicodeForm):
            raise ConfigError(
                f"unknown unicode form {self.unicode_form!r}",
                where="data.collator.unicode_form",
                fix=f"null, or one of {', '.join(get_args(UnicodeForm))}",
            )

    def apply(self, caption: str) -> str:
        """The text that is tokenized; never empty where `caption` is not."""
        text = unicodedata.normalize(self.unicode_form, caption) if self.unicode_form else caption
        text = clean_caption(text, self.max_words) if self.clean else _first_words(text, self.max_words)
        # normalising may turn the last character into punctuation, and keeping few words may keep white space alone
        return text if text.strip() else caption


def clean_caption(text: str, max_words: int | None = 50) -> str:
    """Lower-case, turn ten punctuation marks into spaces, collapse runs of whitespace, keep `max_words` words.

    A single tab, line break or no-break space inside the text stays, as in LAVIS. Text without a word gives "".
    """
    spaced = _WHITESPACE_RUN.sub(" ", text.lower().translate(_TO_SPACE))
    return _first_words(spaced.rstrip("\n").strip(" "), max_words)


def clean_question(text: str, max_words: int | None = 50) -> str:
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


def _first_words(text: str, max_words: int | None) -> str:
    return text if max_words is None else " ".join(text.split(" ")[:max_words])
