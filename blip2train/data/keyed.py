"""Key -> random generator: how every random choice about a sample is made independent of who makes it, and when.

LAVIS draws from the worker's global generators, so that a sample's augmentation depends on what was read before it.
"""

from __future__ import annotations

import hashlib

import torch


def keyed_generator(key: str) -> torch.Generator:
    """A CPU generator that depends on nothing but the key, which names the choice: seed, dataset, epoch, record."""
    # surrogatepass: names in a tar need not be UTF-8
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    # torch seeds its CPU generator with 32 bits
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
