"""Tensor names of one library <-> ours: a table of patterns, read in both directions.

Every checkpoint conversion renames by such a table, so the way back is the same data and cannot drift from the way in.
LAVIS and transformers load by `strict=False`, where a name that maps to nothing vanishes; here it is an error.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from blip2train.errors import CheckpointError

T = TypeVar("T")
Side = Literal["ours", "theirs"]

# {i} is a number (a layer), {leaf} one part of a dotted name (weight, bias), {rest} any number of parts
_FIELDS = {"i": r"\d+", "leaf": r"[^.]+", "rest": r".+"}
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a table: the same tensor's name on both sides.

    Args:
        ours: e.g. "qformer.blocks.{i}.self_attention.query.{leaf}". Fields: {i} a number, {leaf} one part of the
            dotted name, {rest} everything that follows.
        theirs: the other library's name, with the same fields.
    """

    ours: str
    theirs: str

    def __post_init__(self) -> None:
        fields = {side: sorted(_FIELD.findall(pattern)) for side, pattern in self.sides().items()}
        assert fields["ours"] == fields["theirs"] and set(fields["ours"]) <= set(_FIELDS), f"unequal fields in {self}"

    def sides(self) -> dict[Side, str]:
        """The pattern of each side."""
        return {"ours": self.ours, "theirs": self.theirs}


def translate(state: Mapping[str, T], rules: Sequence[Rule], *, to: Side, where: str) -> dict[str, T]:
    """Rename every key of a state dict; the values are handed on as they are.

    Args:
        state: by name of the other side than `to`.
        rules: the table. A name must fit exactly one of its rows.
        to: the side to translate to.
        where: file or folder of the state, for the error.

    Returns:
        The same values in the same order, under the names of `to`.

    Raises:
        CheckpointError: names that fit no row, or two names that become one; lists all of them.
    """
    renamed: dict[str, T] = {}
    origin: dict[str, str] = {}
    unknown: list[str] = []
    for name, value in state.items():
        found = translate_name(name, rules, to=to)
        if found is None:
            unknown.append(name)
        elif found in origin:
            unknown.append(f"{name} (would become {found}, and so would {origin[found]})")
        else:
            renamed[found], origin[found] = value, name
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of {len(state)} tensors have no place on the other side:\n    " + "\n    ".join(unknown),
            where=where,
            fix="check that this is the kind of checkpoint it is said to be; a tensor added by hand must be removed",
        )
    return renamed


def translate_name(name: str, rules: Sequence[Rule], *, to: Side) -> str | None:
    """The name on the other side, or None where no row fits."""
    fitting = [found for rule in rules if (found := _apply(rule, name, to)) is not None]
    assert len(fitting) < 2, f"{name} fits several rows: {fitting}"
    return fitting[0] if fitting else None


def _apply(rule: Rule, name: str, to: Side) -> str | None:
    source, target = (rule.theirs, rule.ours) if to == "ours" else (rule.ours, rule.theirs)
    found = _compile(source).fullmatch(name)
    return None if found is None else target.format(**found.groupdict())


@functools.cache
def _compile(pattern: str) -> re.Pattern[str]:
    parts = _FIELD.split(pattern)  # text, field, text, field, ..., text
    texts, fields = parts[::2], parts[1::2]
    matched = [re.escape(text) + f"(?P<{field}>{_FIELDS[field]})" for text, field in zip(texts, fields, strict=False)]
    return re.compile("".join(matched) + re.escape(texts[-1]))
