"""Types of settings: a word where a number belongs is answered before any work starts, not by the first sum with it.

Implements the schema of `configs/capfilt.yaml`: yaml takes any value, dataclasses say in their annotations what is one.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from blip2train.errors import ConfigError

_WORDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text (a number as text in quotes: '\"5\"')",
    list: "a list of texts",
    dict: "its settings by name",
    type(None): "null",
}


def check_type(value: object, kinds: tuple[type, ...], where: str) -> None:
    """See that a setting is of one of these types; a whole number is a number, too, but true is neither.

    Args:
        value: of the setting.
        kinds: keys of `_WORDS`, or classes of settings.
        where: its config key.

    Raises:
        ConfigError: it is not; names the value.
    """
    if not any(_is(value, kind) for kind in kinds):
        wanted = ", or ".join(_WORDS.get(kind, kind.__name__) for kind in kinds)
        raise ConfigError(f"{where.split('.')[-1]}={value!r}", where=where, fix=f"give {wanted}")


def check_types(settings: Any, where: str) -> None:
    """See that every field of a dataclass is what its annotation says.

    Args:
        settings: its instance.
        where: config key of all of them; empty at the top level.

    Raises:
        ConfigError: a field is not.
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        hint = hints[field.name]
        key = f"{where}.{field.name}" if where else field.name
        check_type(getattr(settings, field.name), get_args(hint) or (hint,), key)


def _is(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    if kind is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, kind)
