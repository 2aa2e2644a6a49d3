"""Files of a hub repository as this machine has them: in the cache, to be fetched, or out of reach. Fetches none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS_TO_ANSWER = 10.0


@dataclass(frozen=True, slots=True)
class HubState:
    """What is known of the hub from here.

    Args:
        offline: HF_HUB_OFFLINE is set: it would not even be asked.
        cache: folder of the copies.
    """

    offline: bool
    cache: Path


def hub_state() -> HubState:
    from huggingface_hub import constants

    return HubState(bool(constants.HF_HUB_OFFLINE), Path(constants.HF_HUB_CACHE))


def cached(repository: str, names: Sequence[str]) -> Path | None:
    """The first of some files of a repository that lies in the cache."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return None


def remote_bytes(repository: str, names: Sequence[str]) -> int | None:
    """Size of the first of some files that the hub has; None where it cannot be reached, or has none of them."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    for name in names:
        try:
            size = get_hf_file_metadata(hf_hub_url(repository, name), timeout=SECONDS_TO_ANSWER).size
        except Exception:  # of whichever library reaches the hub: the file is not to be had from here
            continue
        return size or 0
    return None
