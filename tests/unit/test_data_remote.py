"""Remote bytes arrive whole or not at all, from stores that fail in every way a network has."""

import builtins
import io
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from flaky_server import FlakyServer, serve

from blip2train.data.remote import Remote
from blip2train.errors import ConfigError, DataError

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    with serve(FlakyServer(files={"/a.tar": CONTENT})) as running:
        yield running


def quick(**changes: Any) -> Remote:
    return Remote(**({"wait_s": 0.01, "timeout_s": 5.0} | changes))


def fetched(remote: Remote, url: str, **arguments: Any) -> bytes:
    sink = io.BytesIO()
    remote.fetch(url, sink, **arguments)
    assert sink.tell() == len(sink.getvalue())
    return sink.getvalue()


def test_one_request_brings_a_file(server: FlakyServer) -> None:
    sizes: list[int] = []
    assert fetched(quick(), f"{server.url}/a.tar", on_size=sizes.append) == CONTENT
    assert (server.requests, sizes) == ([("/a.tar", None)], [len(CONTENT)])


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_a_server_that_is_busy_is_asked_again(
    server: FlakyServer, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = [status] * 3
    with caplog.at_level(logging.WARNING):
        assert fetched(quick(), f"{server.url}/a.tar") == CONTENT
    assert len(server.requests) == 4
    assert "attempt 3 of 5" in caplog.text


def test_a_server_that_stays_busy_is_an_error_that_names_url_and_attempts(server: FlakyServer) -> None:
    server.faults = [503] * 9
    with pytest.raises(DataError, match=r"after 3 attempts .*503") as error:
        fetched(quick(attempts=3), f"{server.url}/a.tar")
    assert f"{server.url}/a.tar" in str(error.value)
    assert len(server.requests) == 3


@pytest.mark.parametrize(("status", "kind"), [(404, "FileNotFound"), (403, "Permission"), (401, "Permission")])
def test_what_is_not_there_or_not_allowed_is_asked_for_once(server: FlakyServer, status: int, kind: str) -> None:
    server.faults = [status]
    with pytest.raises(DataError, match=kind):
        fetched(quick(), f"{server.url}/a.tar")
    assert len(server.requests) == 1


def test_a_download_goes_on_where_it_broke_off(server: FlakyServer) -> None:
    # silence, as bytes in flight are lost with a connection that is closed
    server.faults = [("silent", 100_000), ("silent", 150_000)]
    assert fetched(quick(timeout_s=0.3), f"{server.url}/a.tar") == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-", "bytes=250000-"]


def test_a_file_that_changed_meanwhile_starts_again(server: FlakyServer) -> None:
    server.faults = [("cut", 100_000)]
    other = CONTENT[::-1] + b"more"

    def change(size: int) -> None:
        server.files["/a.tar"] = other

    assert fetched(quick(), f"{server.url}/a.tar", on_size=change) == other


def test_a_server_without_ranges_starts_again(server: FlakyServer) -> None:
    server.ranges, server.faults = False, [("cut", 100_000)]
    assert fetched(quick(), f"{server.url}/a.tar") == CONTENT


def test_a_server_that_falls_silent_is_left(server: FlakyServer) -> None:
    server.faults = [("silent", 50_000)]
    start = time.monotonic()
    assert fetched(quick(timeout_s=0.3), f"{server.url}/a.tar") == CONTENT
    assert time.monotonic() - start < server.silence_s


def test_bytes_that_an_unannounced_end_hides_are_missed_if_their_number_is_known(server: FlakyServer) -> None:
    server.chunked, server.faults = True, [("cut", 100_000)]
    assert fetched(quick(), f"{server.url}/a.tar", num_bytes=len(CONTENT)) == CONTENT
    with pytest.raises(DataError, match=r"300000 of 300001 bytes"):
        fetched(quick(attempts=2), f"{server.url}/a.tar", num_bytes=len(CONTENT) + 1)


def test_headers_of_the_storage_options_are_sent(server: FlakyServer) -> None:
    remote = quick(options={"headers": {"Authorization": "Bearer secret"}})
    fetched(remote, f"{server.url}/a.tar")
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_nobody_at_the_other_end_is_an_error_after_all_attempts() -> None:
    with serve(FlakyServer()) as gone:
        url = gone.url
    with pytest.raises(DataError, match="after 2 attempts"):
        fetched(quick(attempts=2), f"{url}/a.tar")


def test_any_store_of_fsspec_works(tmp_path: Path) -> None:
    with fsspec.open("memory://bucket/deep/a.tar", "wb") as file:
        file.write(CONTENT)
    sizes: list[int] = []
    assert fetched(quick(), "memory://bucket/deep/a.tar", on_size=sizes.append) == CONTENT
    assert sizes == [len(CONTENT)]
    assert quick().list("memory://bucket/deep/*.tar") == ["memory:///bucket/deep/a.tar"]
    with pytest.raises(DataError, match="FileNotFound"):
        fetched(quick(), "memory://bucket/gone.tar")


def test_small_files_are_read_or_absent(server: FlakyServer, tmp_path: Path) -> None:
    server.files["/index.json"] = b"{}"
    (tmp_path / "index.json").write_bytes(b"[]")
    assert quick().read(f"{server.url}/index.json") == b"{}"
    assert quick().read(str(tmp_path / "index.json")) == b"[]"
    assert quick().read(f"{server.url}/gone.json") is None
    assert quick().read(str(tmp_path / "gone.json")) is None
    server.faults = [403]
    assert quick().read(f"{server.url}/index.json") is None
    server.faults = [503] * 9
    with pytest.raises(DataError, match="after 5 attempts"):
        quick().read(f"{server.url}/index.json")


def test_a_command_gives_its_output_and_its_failure_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    assert fetched(quick(), f"pipe:cat {tmp_path}/a.tar") == CONTENT
    with pytest.raises(DataError, match=r"after 2 attempts .*exit status 3: no such bucket"):
        fetched(quick(attempts=2), f"pipe:head -c 10 {tmp_path}/a.tar; echo no such bucket >&2; exit 3")


def test_a_command_that_says_nothing_is_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=r"no output for 0.2 s"):
        fetched(quick(attempts=1, timeout_s=0.2), "pipe:sleep 60; echo late")
    assert time.monotonic() - start < 10


def test_pauses_grow_with_jitter_up_to_a_bound(server: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.faults = [503] * 9
    with pytest.raises(DataError):
        fetched(Remote(attempts=7, wait_s=1.0, max_wait_s=8.0), f"{server.url}/a.tar")
    for pause, middle in zip(pauses, (1, 2, 4, 8, 8, 8), strict=True):
        assert 0.5 * middle <= pause <= 1.5 * middle
    assert len(set(pauses)) == 6


def test_stores_nobody_knows_and_missing_packages_are_config_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="http"):
        fetched(quick(), "nostore://a/b.tar")
    imported = builtins.__import__

    def without_s3fs(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("s3fs"):
            raise ImportError("no s3fs")
        return imported(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_s3fs)
    with pytest.raises(ConfigError, match=r"blip2train\[remote\]"):
        fetched(quick(), "s3://bucket/a.tar")
    with pytest.raises(ConfigError, match="attempts=0"):
        Remote(attempts=0)
