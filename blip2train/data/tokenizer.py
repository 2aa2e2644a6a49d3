"""Text -> token ids, for the Q-Former (BERT's vocabulary plus [DEC]) and for any language model.

Implements the text side of BLIP-2 (paper section 3.1: a new [DEC] token starts generation). Differs from LAVIS: runs
in the collator, not in `forward`; pads to the longest text, not to 32; truncation never removes the end token; the
padding side is an argument, where LAVIS flips it on the shared tokenizer and can leave it flipped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from blip2train.errors import ConfigError

# loader workers are forked: the tokenizer's own threads would deadlock there, and say so on every start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class QFormerTokenizer:
    """BERT-shaped tokenizer with [CLS], [SEP], [PAD] and the [DEC] token that starts generation.

    Args:
        tokenizer: a transformers tokenizer that knows cls, sep and pad; [DEC] is added as bos when it has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        _require(tokenizer, ("cls_token", "sep_token", "pad_token"))
        if tokenizer.bos_token is None:
            tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        self._tokenizer = tokenizer
        self.cls_id: int = tokenizer.cls_token_id
        self.sep_id: int = tokenizer.sep_token_id
        self.pad_id: int = tokenizer.pad_token_id
        self.dec_id: int = tokenizer.bos_token_id
        self.vocab_size: int = len(tokenizer)

    @property
    def words(self) -> list[str]:
        """The vocabulary by id, [DEC] included."""
        words: list[str] = self._tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))
        return words

    @property
    def transformers_tokenizer(self) -> Any:
        """The tokenizer itself, [DEC] included, for an export to transformers."""
        return self._tokenizer

    @classmethod
    def load(cls, path: str | Path, vocab_size: int | None = None, dec_id: int | None = None) -> Self:
        """Load a saved tokenizer, a folder with only `vocab.txt`, or a model hub name.

        Args:
            path: local folder or hub name.
            vocab_size: number of tokens, [DEC] included, that the model is built for; checked where given.
            dec_id: id of [DEC] that the generation loss uses; checked where given.

        Raises:
            ConfigError: nothing loadable there, or its numbers are not the stated ones.
        """
        loaded = cls(_load(path))
        for name, stated, found in (
            ("vocab_size", vocab_size, loaded.vocab_size),
            ("dec_id", dec_id, loaded.dec_id),
        ):
            if stated is not None and stated != found:
                raise ConfigError(
                    f"{name} is stated as {stated}, the tokenizer in {str(path)!r} has {found}",
                    where=f"tokenizer.{name}",
                    fix=f"set tokenizer.{name}={found}; weights trained with another vocabulary will not fit",
                )
        return loaded

    def __call__(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Encode B texts to ids and mask (B, T), T the longest of them and at most `max_length`.

        Rows start with [CLS] and end with [SEP], cut text included, and are padded on the right.
        """
        bodies = _bodies(self._tokenizer, texts, max_length - 2)
        return _pad([[self.cls_id, *body, self.sep_id] for body in bodies], self.pad_id, "right")

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has with nothing cut off, [CLS] and [SEP] included."""
        return [2 + len(body) for body in _bodies(self._tokenizer, texts, sys.maxsize)]

    def decode(self, ids: Tensor) -> list[str]:
        """Turn (B, T) ids into B stripped texts: special tokens skipped, nothing after the first [SEP]."""
        rows = [_until(row, {self.sep_id}) for row in ids.tolist()]
        return [str(self._tokenizer.decode(row, skip_special_tokens=True)).strip() for row in rows]


class LanguageModelTokenizer:
    """Tokenizer of a language model; start, end and padding are put on here, explicitly.

    A caption that contains "</s>" is spelled out where the vocabulary allows it (byte-level BPE, so OPT and LLaMA 3):
    data cannot smuggle control tokens in. T5's vocabulary reads "</s>" as its end token in any case; it is left as
    published.

    `word_separator` is what text must start with when it goes on after a word and is encoded on its own: a space for
    byte-level BPE, nothing for tokenizers that begin every text as a new word (T5, LLaMA 2).

    Args:
        tokenizer: a transformers tokenizer.
        end_token: what ends a target, a text or an id; the tokenizer's eos when omitted. LAVIS ends OPT captions with a
            line break.
        start_token: False never prepends the tokenizer's bos, for models that were trained without one (Pythia).
        open_prompt: False leaves the start token out of a prompt with words in it; an empty prompt keeps it.
        close_prompt: end a prompt by the tokenizer's eos. T5's own tokenizer does, and so do LAVIS and transformers.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_token: str | int | None = None,
        start_token: bool = True,
        open_prompt: bool = True,
        close_prompt: bool = False,
    ) -> None:
        _require(tokenizer, ("eos_token",))
        self._tokenizer = tokenizer
        self._stop_id: int = tokenizer.eos_token_id
        self.end_id: int = self._stop_id if end_token is None else _single_id(tokenizer, end_token)
        self.start_id: int | None = tokenizer.bos_token_id if start_token else None
        self._open_prompt, self._close_prompt = open_prompt, close_prompt
        self.pad_id: int = self._stop_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.vocab_size: int = len(tokenizer)
        spelled = tokenizer(tokenizer.eos_token, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        self._spell_control_tokens = self._stop_id not in spelled
        self.word_separator: str = _word_separator(tokenizer)

    @classmethod
    def load(
        cls,
        path: str | Path,
        end_token: str | int | None = None,
        start_token: bool = True,
        open_prompt: bool = True,
        close_prompt: bool = False,
    ) -> Self:
        """Load a saved tokenizer or a model hub name.

        Raises:
            ConfigError: nothing loadable there, or `end_token` is not exactly one token.
        """
        return cls(_load(path), end_token, start_token, open_prompt, close_prompt)

    @property
    def transformers_tokenizer(self) -> Any:
        """The tokenizer itself, for an export to transformers."""
        return self._tokenizer

    def encode_prompt(
        self, prompts: Sequence[str], max_length: int, side: Literal["left", "right"] = "right"
    ) -> tuple[Tensor, Tensor]:
        """Encode B prompts as the model reads them, opened and closed by its tokens: ids and mask (B, T).

        Args:
            prompts: B strings; a long one loses its last words.
            max_length: in tokens, opening and closing ones included.
            side: where the padding goes.
        """
        start = [] if self.start_id is None else [self.start_id]
        end = [self._stop_id] if self._close_prompt else []
        room = max_length - len(start) - len(end)
        bodies = _bodies(self._tokenizer, prompts, room, split_special_tokens=self._spell_control_tokens)
        rows = [[*(start if self._open_prompt or not body else []), *body, *end] for body in bodies]
        return _pad(rows, self.pad_id, side)

    def encode(
        self,
        texts: Sequence[str],
        max_length: int,
        side: Literal["left", "right"] = "right",
        add_end: bool = False,
        add_start: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Encode B texts to ids and mask (B, T), T the longest of them and at most `max_length`.

        Long text loses its last tokens, never its end token. Empty texts without start and end give T = 0. A model
        without a start token (T5) gets none even if `add_start`.

        Args:
            texts: B strings.
            max_length: in tokens, start and end included.
            side: where the padding goes: right for training, left for prompts that are continued.
            add_end: append `end_id`.
            add_start: prepend `start_id`.
        """
        start = [self.start_id] if add_start and self.start_id is not None else []
        end = [self.end_id] if add_end else []
        room = max_length - len(start) - len(end)
        bodies = _bodies(self._tokenizer, texts, room, split_special_tokens=self._spell_control_tokens)
        return _pad([[*start, *body, *end] for body in bodies], self.pad_id, side)

    def decode(self, ids: Tensor) -> list[str]:
        """Turn (B, T) generated ids into B stripped texts: special tokens skipped, nothing after the end token.

        A first token equal to `start_id` is skipped, also where start and eos are one token (OPT).
        """
        stops = {self.end_id, self._stop_id}
        texts = []
        for row in ids.tolist():
            body = row[1:] if row and row[0] == self.start_id and self.start_id != self.end_id else row
            texts.append(str(self._tokenizer.decode(_until(body, stops), skip_special_tokens=True)).strip())
        return texts


def _load(path: str | Path) -> Any:
    from transformers import AutoTokenizer, BertTokenizer  # seconds of import: only where a tokenizer is wanted

    folder = Path(path)
    saved = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "config.json"))
    if (folder / "vocab.txt").is_file() and not saved:
        words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, do_lower_case=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"no tokenizer in {str(path)!r} ({reason})",
            where="tokenizer",
            fix="give a folder with tokenizer.json or vocab.txt, or the name of a model on the hub (network once)",
        ) from error
    _check_words(tokenizer, path)
    return tokenizer


def _check_words(tokenizer: Any, path: str | Path) -> None:
    # of a folder with config.json alone transformers makes a tokenizer that encodes any text to nothing
    ordinary = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    if len(ordinary) < 2:  # T5's keeps one, its mark of a new word
        raise ConfigError(
            f"no tokenizer in {str(path)!r}: transformers finds a vocabulary of special tokens alone there",
            where="tokenizer",
            fix="copy the tokenizer's files (tokenizer.json, ...) beside config.json, or set the tokenizer's own path",
        )


def _require(tokenizer: Any, names: Sequence[str]) -> None:
    known = tokenizer.special_tokens_map
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(
            f"tokenizer without {', '.join(missing)} (it has {', '.join(known) or 'no special tokens'})",
            where="tokenizer",
            fix="add them to tokenizer_config.json or special_tokens_map.json",
        )


def _single_id(tokenizer: Any, token: str | int) -> int:
    if isinstance(token, int):
        return token
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ConfigError(
            f"end token {token!r} is {len(ids)} tokens ({ids})",
            where="end_token",
            fix="choose a string that is one token, or omit it to use the eos token",
        )
    return int(ids[0])


def _word_separator(tokenizer: Any) -> str:
    whole, word = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a a", "a"))
    return "" if whole == word + word else " "


def _bodies(tokenizer: Any, texts: Sequence[str], max_length: int, **options: bool) -> list[list[int]]:
    assert max_length >= 0, "max_length leaves no room for the special tokens"
    if not texts:
        return []
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, **options
    )
    return [ids[:max_length] for ids in encoded["input_ids"]]


def _pad(rows: list[list[int]], pad_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    longest = max((len(row) for row in rows), default=0)
    ids: list[list[int]] = []
    mask: list[list[bool]] = []
    for row in rows:
        fill = longest - len(row)
        left, right = (0, fill) if side == "right" else (fill, 0)
        ids.append([pad_id] * left + row + [pad_id] * right)
        mask.append([False] * left + [True] * len(row) + [False] * right)
    shape = (len(rows), longest)
    return torch.tensor(ids, dtype=torch.int64).view(shape), torch.tensor(mask, dtype=torch.bool).view(shape)


def _until(row: list[int], stops: set[int]) -> list[int]:
    cut = next((index for index, token in enumerate(row) if token in stops), len(row))
    return row[:cut]
