"""Raw caption -> the words that the COCO caption metrics compare.

Behaves like Stanford's PTBTokenizer 3.4.1 with `-preserveLines -lowerCase` and coco-caption's punctuation list, which the
published scores (and LAVIS's) go through, without its Java.
"""

from __future__ import annotations

import re

_PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
_TOKEN = re.compile(r"\w+(?:[-'./]\w+)*|\S")


def caption_words(caption: str) -> list[str]:
    return [word for word in _TOKEN.findall(caption.lower()) if word not in _PUNCTUATION]
