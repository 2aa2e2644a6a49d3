"""Urls -> bytes: the only door to fsspec, and to the commands of `pipe:` urls."""

from __future__ import annotations

from pathlib import Path


def is_remote(url: str) -> bool:
    """Whether it is a url or a command, no path."""
    return url.startswith("pipe:") or "://" in url


def beside(url: str, name: str) -> str:
    """The file `name` in the folder of a shard."""
    if not is_remote(url):
        return str(Path(url).parent / name)
    return f"{url.split('?')[0].rsplit('/', 1)[0]}/{name}"


def read_small(url: str) -> bytes | None:
    """A whole file; None if it does not exist."""
    try:
        return Path(url).read_bytes()
    except FileNotFoundError:
        return None
