"""Nested settings -> leaves by dotted name, and the leaves in which two of them differ.

Implements no part of the paper: a folder of results belongs to the settings that it was begun with, and whoever is
refused is told which of them have changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """Leaves by dotted name: {"a": {"b": 1}} -> {"a.b": 1}. Lists are leaves.

    Args:
        node: mappings of mappings, of anything.
        path: name of `node` itself.
    """
    if not isinstance(node, Mapping):
        return {path: node}
    return {
        name: leaf
        for key, value in node.items()
        for name, leaf in flatten(value, f"{path}.{key}" if path else str(key)).items()
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(before, now) of every leaf that is not the same, in alphabetical order; None stands for what is not there."""
    old, new = flatten(before), flatten(now)
    return {
        name: (old.get(name), new.get(name))
        for name in sorted({*old, *new})
        if _plain(old.get(name)) != _plain(new.get(name))
    }


def _plain(value: Any) -> Any:
    """JSON knows no tuples."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
