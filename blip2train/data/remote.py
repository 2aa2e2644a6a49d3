"""Urls -> bytes, in as many attempts as it takes.

Implements reading from http(s), s3, gs, every other store fsspec knows, and the commands of `pipe:` urls. What fails is
tried again after a growing, jittered pause, and goes on where it broke off (`data/transfer.py`). webdataset runs curl
for these urls, and takes a transfer that broke off for the end of the shard.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from blip2train.data.transfer import BrokenOffError, FullError, RefusedError, Transfer, open_store
from blip2train.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WORTH_A_RETRY = {408, 409, 416, 425, 429}
_jitter = random.SystemRandom()

# NotImplementedError: fsspec's word for what a store cannot do at all, such as listing
_FINAL = (FileNotFoundError, PermissionError, NotImplementedError, RefusedError, FullError)
"""No second attempt helps."""


@dataclass(frozen=True)
class Remote:
    """How stores are reached.

    Args:
        options: `storage_options` of fsspec for the stores: {"headers": {...}} for https, {"anon": true}, {"key", ...}
            or {"client_kwargs": {"endpoint_url": ...}} for s3, {"token": ...} for gs. What is not given, the store's
            library finds in its usual files and variables.
        attempts: in all, before a url counts as out of reach.
        wait_s: seconds before the second attempt; doubled for each further one, times a random 0.5 to 1.5.
        max_wait_s: longest pause.
        timeout_s: seconds to connect, and without a byte, before an attempt counts as failed.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 5
    wait_s: float = 1.0
    max_wait_s: float = 60.0
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.timeout_s <= 0 or self.wait_s < 0:
            raise ConfigError(
                f"attempts={self.attempts}, wait_s={self.wait_s}, timeout_s={self.timeout_s}",
                where="data.cache",
                fix="at least one attempt, a positive timeout and no negative pause",
            )

    def fetch(
        self, url: str, sink: BinaryIO, *, num_bytes: int | None = None, on_size: Callable[[int], None] | None = None
    ) -> None:
        """Copy a whole file.

        Args:
            url: remote.
            sink: seekable and empty; holds the file afterwards, its position at the end.
            num_bytes: what the file must have, if known.
            on_size: called with the file's size once the store has told it, before anything is written.

        Raises:
            DataError: not there, not allowed, or not reached in all attempts.
            ConfigError: an unknown kind of store, or one whose package is missing.
        """
        transfer = Transfer(url, sink, self.options, self.timeout_s, num_bytes, on_size)
        self._try(url, transfer.attempt)

    def read(self, url: str) -> bytes | None:
        """A whole small file, local or remote; None if it does not exist, or a store does not show it."""
        if not is_remote(url):
            return Path(url).read_bytes() if Path(url).is_file() else None
        sink = BytesIO()
        try:
            self.fetch(url, sink)
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            if isinstance(error.__cause__, PermissionError):
                # a bucket that may not be listed answers so for whatever is not there
                logger.info("%s: not allowed to read it, taken as not there", url)
                return None
            raise
        return sink.getvalue()

    def list(self, pattern: str) -> list[str]:
        """Urls that match a pattern with `*`, in alphabetical order.

        Raises:
            DataError: the store cannot be listed.
        """

        def glob() -> list[str]:
            files, path = open_store(pattern, self.options)
            return sorted(str(files.unstrip_protocol(found)) for found in files.glob(path))

        return self._try(pattern, glob)

    def _try(self, url: str, action: Callable[[], T]) -> T:
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except (ConfigError, DataError):
                raise
            except Exception as error:  # of whichever library reaches the store
                cause = _translate(error)
                final = isinstance(cause, _FINAL) or attempt == self.attempts
                if final:
                    raise _give_up(url, cause, attempt) from cause
                pause = min(self.max_wait_s, self.wait_s * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1.5)
                logger.warning(
                    "%s: attempt %d of %d failed (%s), again in %.1f s",
                    *(url, attempt, self.attempts, _say(cause), pause),
                )
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


def is_remote(url: str) -> bool:
    """Whether it is a url or a command, no path."""
    return url.startswith("pipe:") or "://" in url


def beside(url: str, name: str) -> str:
    """The file `name` in the folder of a shard."""
    if not is_remote(url):
        return str(Path(url).parent / name)
    return f"{url.split('?')[0].rsplit('/', 1)[0]}/{name}"


def _translate(error: Exception) -> Exception:
    """What an error of a store's library means: not there, not allowed, or worth another attempt."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if status in {404, 410}:
        return FileNotFoundError(f"status {status}")
    if status in {401, 403}:
        return PermissionError(f"status {status}")
    if isinstance(status, int) and 400 <= status < 500 and status not in _WORTH_A_RETRY:
        return RefusedError(f"status {status}")
    return error


def _give_up(url: str, cause: Exception, attempts: int) -> DataError:
    fixes = {
        FileNotFoundError: "check the url",
        PermissionError: "check the credentials (storage_options of the dataset)",
        FullError: "free space, or choose another folder for the cache (data.cache.folder)",
    }
    fix = next((text for kind, text in fixes.items() if isinstance(cause, kind)), None)
    times = f" after {attempts} attempts" if attempts > 1 else ""
    return DataError(
        f"a remote file that cannot be read{times} ({_say(cause)})",
        where=url,
        fix=fix or "check the network and the url; data.cache.attempts and data.cache.timeout_s say how long to try",
    )


def _say(error: Exception) -> str:
    text = str(error).strip()
    known = isinstance(error, (BrokenOffError, FullError, RefusedError))
    return text if known else f"{type(error).__name__}: {text}" if text else type(error).__name__
