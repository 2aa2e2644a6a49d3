"""One attempt at a remote file: the only door to fsspec and aiohttp, and to the commands of `pipe:` urls.

Implements a download that goes on where the last attempt broke off, if the file is still the same, and that notices
bytes which are missing.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from typing import Any, BinaryIO

from blip2train.errors import ConfigError

_CHUNK = 4 << 20


class FullError(Exception):
    """Writing failed on our side."""


class RefusedError(Exception):
    """The server does not take the request."""


class BrokenOffError(Exception):
    """Fewer or more bytes than announced, or none for too long."""


class Transfer:
    """One file on its way, over several attempts.

    Args:
        url: remote.
        sink: seekable and empty; holds the file afterwards, its position at the end.
        options: `storage_options` of fsspec.
        timeout_s: seconds to connect, and without a byte, before an attempt has failed.
        num_bytes: what the file must have, if known.
        on_size: called with the file's size once the store has told it, before anything is written.
    """

    def __init__(
        self,
        url: str,
        sink: BinaryIO,
        options: Mapping[str, Any],
        timeout_s: float,
        num_bytes: int | None = None,
        on_size: Callable[[int], None] | None = None,
    ) -> None:
        self._url, self._sink, self._options, self._timeout_s = url, sink, options, timeout_s
        self._wanted = num_bytes
        self._announced: int | None = None
        self._on_size = on_size
        self._version: str | None = None  # of what the sink holds; without one, nothing can be gone on with

    def attempt(self) -> None:
        """Bring what is missing.

        Raises:
            ConfigError: an unknown kind of store, or one whose package is missing.
            Exception: whatever the store's library raises, or one of this module's.
        """
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

        headers = {**self._options.get("headers", {}), "Accept-Encoding": "identity"}
        start = self._sink.tell() if self._version else 0
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": self._version}
        seconds = self._timeout_s
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        options = dict(self._options)
        options["client_kwargs"] = {"trust_env": True, **options.get("client_kwargs", {})}
        files, path = open_store(self._url, options)
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
                raise BrokenOffError(f"asked for bytes from {start} on, got {begin or 'others'}")
            tag = response.headers.get("ETag", "")
            self._version = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")
            length = response.headers.get("Content-Length")
            self._announce(None if length is None else self._sink.tell() + int(length))
            self._drain(stream.read)

    def _copy(self) -> None:
        """Any other store: ranges from where the last attempt broke off, if the file is as it was."""
        files, path = open_store(self._url, self._options)
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
                if not select.select([output], [], [], self._timeout_s)[0]:
                    raise BrokenOffError(f"no output for {self._timeout_s:g} s")
                return os.read(output, size)

            try:
                self._drain(read, check=False)
                status = process.wait(self._timeout_s)
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
            if status:
                errors.seek(0)
                said = errors.read(1000).decode("utf-8", "replace").strip()
                raise BrokenOffError(f"exit status {status}: {said or 'no message'}")
            self._check()

    def _restart(self) -> None:
        self._sink.seek(0)
        self._sink.truncate()

    def _announce(self, size: int | None) -> None:
        if size is not None and self._wanted is not None and size != self._wanted:
            raise BrokenOffError(f"a file of {size} bytes, where {self._wanted} are expected")
        self._announced = size
        if size is not None and self._on_size is not None:
            self._on_size(size)

    def _drain(self, read: Callable[[int], bytes], check: bool = True) -> None:
        while chunk := read(_CHUNK):
            try:
                self._sink.write(chunk)
            except OSError as error:
                raise FullError(f"cannot be written here: {error.strerror}") from error
        if check:
            self._check()

    def _check(self) -> None:
        received, expected = self._sink.tell(), self._wanted if self._announced is None else self._announced
        if expected is not None and received != expected:
            raise BrokenOffError(f"{received} of {expected} bytes")


def open_store(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The fsspec file system of a url, and the url's path in it.

    Raises:
        ConfigError: an unknown kind of store, or one whose package is missing.
    """
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
