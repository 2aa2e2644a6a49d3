"""Tokenizers at the border to transformers: what ours puts around a prompt, and the <image> token of a Blip2Processor.

Not in the paper. transformers' Blip2 marks the visual prompt's place by ids of an <image> token, so its language model
needs a row for that id; in ours the visual prompt has no ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from blip2train.errors import ConfigError

IMAGE_TOKEN = "<image>"
_NEVER = -1.0e9  # added to the logit of <image>: a language model never says it
_PROBE = "a"


def tokenizer_settings(tokenizer: Any, text_config: Any) -> dict[str, Any]:
    """Our `LanguageModelTokenizer` settings under which prompts get the ids that this tokenizer gives them.

    Args:
        tokenizer: of transformers, as a Blip2Processor calls it.
        text_config: of the language model; its eos ends a generation, whatever the tokenizer's is (OPT: a line break).

    Returns:
        Arguments by name. `end_token` is an id where no text is exactly that token (half a character of bytes).
    """
    ids = tokenizer(_PROBE)["input_ids"]
    end_id = _end_id(text_config)
    end_token: str | int | None = None
    if end_id is not None and end_id != tokenizer.eos_token_id:
        spelled = _spelling(tokenizer, end_id)
        end_token = end_id if spelled is None else spelled
    return {
        "end_token": end_token,
        "open_prompt": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "close_prompt": len(ids) > 1 and ids[-1] == tokenizer.eos_token_id,
    }


def end_note(end_token: str | int | None, tokenizer: Any) -> list[str]:
    """A word on an end token that only its id names: almost always a mistake in the source's config."""
    if not isinstance(end_token, int):
        return []
    return [
        f"text_config.eos_token_id is {end_token}, which no text is exactly; the tokenizer's own eos is "
        f"{tokenizer.eos_token_id}. As in transformers, texts end at {end_token}; if that is a mistake, correct "
        "eos_token_id in the source's config.json and convert again, or set llm.tokenizer.end_token to null"
    ]


def _end_id(text_config: Any) -> int | None:
    end = text_config.eos_token_id
    first = end[0] if isinstance(end, list) else end
    return None if first is None else int(first)


def _spelling(tokenizer: Any, token_id: int) -> str | None:
    """The text that is exactly this token, None if there is none."""
    text = str(tokenizer.decode([token_id]))
    return text if tokenizer(text, add_special_tokens=False)["input_ids"] == [token_id] else None


def frame_prompts(tokenizer: Any, probe: list[int], before: list[int], after: list[int]) -> bool:
    """Make a fast tokenizer put `before` and `after` around every text, as ours does; returns whether it had to change.

    Args:
        tokenizer: of transformers; changed in place.
        probe: the ids our tokenizer gives the text "a" as a prompt, `before` and `after` included.
        before: ids that open a prompt.
        after: ids that close it.

    Raises:
        ConfigError: it frames texts otherwise and has no exchangeable post-processor.
    """
    if tokenizer(_PROBE)["input_ids"] == probe:
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            "the tokenizer frames prompts otherwise than in training, and cannot be changed",
            where="llm.tokenizer",
            fix="give a fast tokenizer (tokenizer.json)",
        )
    names = {token: tokenizer.convert_ids_to_tokens(token) for token in {*before, *after}}
    single = [*(names[token] for token in before), "$A", *(names[token] for token in after)]
    backend.post_processor = TemplateProcessing(
        single=single, pair=[*single, "$B"], special_tokens=[(name, token) for token, name in names.items()]
    )
    assert tokenizer(_PROBE)["input_ids"] == probe, "the template gives other ids than ours"
    return True


def add_image_rows(state: Mapping[str, Tensor], names: list[str], rows: int) -> dict[str, Tensor]:
    """Lengthen the named embeddings (V, ...) to `rows` with zeros, for an <image> token without a free row."""
    longer = dict(state)
    done: dict[int, Tensor] = {}
    for name in names:
        old = state[name]
        if old.data_ptr() not in done:
            done[old.data_ptr()] = torch.cat([old, old.new_zeros(rows - old.shape[0], *old.shape[1:])])
        longer[name] = done[old.data_ptr()]
    return longer


def never_say(image_id: int) -> dict[str, Any]:
    """Generation settings under which the row of <image> changes no score: it is struck out, the rest renormalised.

    transformers' Blip2 generates with its inner language model's settings, which it takes from text_config.
    """
    return {"sequence_bias": [[[image_id], _NEVER]], "renormalize_logits": True}


def forget_image_token(folder: Path) -> None:
    """Take <image> out of saved tokenizer files, for a language model whose added row was taken away again."""
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        path = folder / name
        if not path.is_file():
            continue
        raw = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(raw.get(key), list):
            raw[key] = [token for token in raw[key] if token["content"] != IMAGE_TOKEN]
        elif isinstance(raw.get(key), dict):
            raw[key] = {index: token for index, token in raw[key].items() if token["content"] != IMAGE_TOKEN}
        path.write_text(json.dumps(raw, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
