"""Names of the number formats a frozen part can be stored in.

The paper keeps ViT and LLM in FP16 and Flan-T5 in BF16; a yaml names the format, an adapter stores its weights in it.
"""

from __future__ import annotations

import torch

from blip2train.errors import ConfigError

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def to_dtype(name: str, *, where: str) -> torch.dtype:
    """Translate a yaml's dtype name.

    Args:
        name: "float32", "float16" or "bfloat16".
        where: config key named in the error.

    Raises:
        ConfigError: any other name.
    """
    if name not in _DTYPES:
        raise ConfigError(f"unknown dtype {name!r}", where=where, fix=f"one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
