"""A timm name -> where timm would read its pretrained weights, without reading or fetching anything."""

from __future__ import annotations

import timm

_SAFE = {"pytorch_model.bin": "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
"""What timm looks for before the file that it names."""


def pretrained_place(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The hub repository and the files there, the first one found is taken; None for a name without weights there.

    Args:
        name: of a timm model, with its tag.
    """
    known = timm.get_pretrained_cfg(name)
    if known is None or not known.hf_hub_id:
        return None
    file = known.hf_hub_filename or "pytorch_model.bin"
    safe = _SAFE.get(file) or (f"{file.removesuffix('.bin')}.safetensors" if file.endswith(".bin") else None)
    return known.hf_hub_id, tuple(item for item in (safe, file) if item)
