"""Urls -> bytes: the only door to fsspec, and to the commands of `pipe:` urls.

Implements reading from http(s), s3, gs and every other store fsspec knows. What fails is tried again after a growing,
jittered pause; a download goes on where it broke off; bytes that are missing are noticed. webdataset runs curl for
these urls, and takes a transfer that broke off for the end of the shard.
"""

from __future__ import annotations

import logging
import os
import random
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from blip2train.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CHUNK = 4 << 20
_WORTH_A_RETRY = {408, 409, 416, 425, 429}
_jitter = random.SystemRandom()


class _FullError(Exception):
    """Writing failed on our side."""


class _RefusedError(Exception):
    """The server does not take the request."""


class _BrokenOffError(Exception):
    """Fewer or more bytes than announced, or none for too long."""


# NotImplementedError: fsspec's word for what a store cannot do at all, such as listing
_FINAL = (FileNotFoundError, PermissionError, NotImplementedError, _RefusedError, _FullError)
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
        transfer = _Transfer(self, url, sink, num_bytes, on_size)
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
            files, path = _open_store(pattern, self.options)
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


class _Transfer:
    """One file on its way, over several attempts."""

    def __init__(
        self,
        remote: Remote,
        url: str,
        sink: BinaryIO,
        num_bytes: int | None,
        on_size: Callable[[int], None] | None,
    ) -> None:
        self._remote, self._url, self._sink = remote, url, sink
        self._wanted = num_bytes
        self._announced: int | None = None
        self._on_size = on_size
        self._version: str | None = None  # of what the sink holds; without one, nothing can be gone on with

    def attempt(self) -> None:
        if self._url.startswith("pipe:"):
            self._restart()
            self._run(self._url.removeprefix("pipe:"))
        elif self._url.startswith(("http://", "https://")):
            self._get()
        else:
            self._copy()

    def _get(self) -> None:
        """One GET, from where the last one broke off if the server still has the same file."""
        import aiohttp

        headers = {**self._remote.options.get("headers", {}), "Accept-Encoding": "identity"}
        start = self._sink.tell() if self._version else 0
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": self._version}
        seconds = self._remote.timeout_s
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        options = dict(self._remote.options)
        options["client_kwargs"] = {"trust_env": True, **options.get("client_kwargs", {})}
        files, path = _open_store(self._url, options)
        try:
            # any size and no block size: one streamed request, and no question for the size before it
            stream = files.open(path, "rb", block_size=0, size=1, headers=headers, timeout=timeout)
        except aiohttp.ClientResponseError as error:
            if error.status == 416:
                self._version = None
            raise
        with closing(stream):
            response = stream.r
            begin = response.headers.get("Content-Range", "")
            if response.status != 206 or not begin.startswith(f"bytes {start}-"):
                self._restart()
            if response.status == 206 and self._sink.tell() != start:
                raise _BrokenOffError(f"asked for bytes from {start} on, got {begin or 'others'}")
            tag = response.headers.get("ETag", "")
            self._version = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")
            length = response.headers.get("Content-Length")
            self._announce(None if length is None else self._sink.tell() + int(length))
            self._drain(stream.read)

    def _copy(self) -> None:
        """Any other store: ranges from where the last attempt broke off, if the file is as it was."""
        files, path = _open_store(self._url, self._remote.options)
        facts = files.info(path)
        version = str({name: facts.get(name) for name in ("size", "ETag", "etag", "generation", "mtime")})
        if version != self._version:
            self._restart()
        self._version = version
        self._announce(facts.get("size"))
        with files.open(path, "rb", block_size=_CHUNK) as stream:
            stream.seek(self._sink.tell())
            self._drain(stream.read)

    def _run(self, command: str) -> None:
        """A command's output; the shell runs it, as webdataset does."""
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(
                command, shell=True, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            ) as process,
        ):
            assert process.stdout is not None
            output = process.stdout.fileno()

            def read(size: int) -> bytes:
                if not select.select([output], [], [], self._remote.timeout_s)[0]:
                    raise _BrokenOffError(f"no output for {self._remote.timeout_s:g} s")
                return os.read(output, size)

            try:
                self._drain(read, check=False)
                status = process.wait(self._remote.timeout_s)
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
            if status:
                errors.seek(0)
                said = errors.read(1000).decode("utf-8", "replace").strip()
                raise _BrokenOffError(f"exit status {status}: {said or 'no message'}")
            self._check()

    def _restart(self) -> None:
        self._sink.seek(0)
        self._sink.truncate()

    def _announce(self, size: int | None) -> None:
        if size is not None and self._wanted is not None and size != self._wanted:
            raise _BrokenOffError(f"a file of {size} bytes, where {self._wanted} are expected")
        self._announced = size
        if size is not None and self._on_size is not None:
            self._on_size(size)

    def _drain(self, read: Callable[[int], bytes], check: bool = True) -> None:
        while chunk := read(_CHUNK):
            try:
                self._sink.write(chunk)
            except OSError as error:
                raise _FullError(f"cannot be written here: {error.strerror}") from error
        if check:
            self._check()

    def _check(self) -> None:
        received, expected = self._sink.tell(), self._wanted if self._announced is None else self._announced
        if expected is not None and received != expected:
            raise _BrokenOffError(f"{received} of {expected} bytes")


def is_remote(url: str) -> bool:
    """Whether it is a url or a command, no path."""
    return url.startswith("pipe:") or "://" in url


def beside(url: str, name: str) -> str:
    """The file `name` in the folder of a shard."""
    if not is_remote(url):
        return str(Path(url).parent / name)
    return f"{url.split('?')[0].rsplit('/', 1)[0]}/{name}"


def _open_store(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The fsspec file system of a url, and the url's path in it."""
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise ConfigError(
            f"a store whose package is not installed ({error})",
            where=url,
            fix="pip install 'blip2train[remote]' has those of s3:// and gs://",
        ) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"a url that cannot be opened ({error})",
            where=url,
            fix="give a path, pipe:COMMAND, or a url of http(s), s3 or gs; and storage_options that this store takes",
        ) from error
    return files, path


def _translate(error: Exception) -> Exception:
    """What an error of a store's library means: not there, not allowed, or worth another attempt."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if status in {404, 410}:
        return FileNotFoundError(f"status {status}")
    if status in {401, 403}:
        return PermissionError(f"status {status}")
    if isinstance(status, int) and 400 <= status < 500 and status not in _WORTH_A_RETRY:
        return _RefusedError(f"status {status}")
    return error


def _give_up(url: str, cause: Exception, attempts: int) -> DataError:
    fixes = {
        FileNotFoundError: "check the url",
        PermissionError: "check the credentials (storage_options of the dataset)",
        _FullError: "free space, or choose another folder for the cache (data.cache.folder)",
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
    known = isinstance(error, (_BrokenOffError, _FullError, _RefusedError))
    return text if known else f"{type(error).__name__}: {text}" if text else type(error).__name__
