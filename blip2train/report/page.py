"""A template beside this file and its values -> HTML, everything escaped; the one door to jinja2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2


def render_template(name: str, /, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """Fill in a template.

    Args:
        name: of the template's file; `style.css` beside it is what all pages look like.
        filters: functions that the template applies by name.
        values: what it shows; a missing one is an error, and markup in one is shown as text.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(filters)
    return environment.get_template(name).render(**values)
