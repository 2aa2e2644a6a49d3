"""A log file on a full disk loses its lines and nothing else; several ranks speak once."""

import logging
import logging.handlers
from collections.abc import Iterator
from pathlib import Path

import pytest

from blip2train import distributed
from blip2train.cli.log_file import outlive_full_disk, speak_once


@pytest.fixture
def handler() -> Iterator[logging.FileHandler]:
    """Of the root logger, on a device that is always full."""
    handler = logging.FileHandler("/dev/full")
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)
    handler.stream = None  # what it holds cannot be flushed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_prints_no_stack_trace_and_a_mistake_does(
    handler: logging.FileHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("test_cli_log_file")
    log.error("a line")
    assert "No space left on device" in capsys.readouterr().err
    outlive_full_disk()
    log.error("a line")
    assert capsys.readouterr().err == ""
    handler.handle(logging.LogRecord("name", logging.ERROR, "path", 1, "%d lines", ("no number",), None))
    assert "Logging error" in capsys.readouterr().err


def test_what_all_ranks_say_is_heard_from_the_main_one_and_warnings_from_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [heard := logging.handlers.BufferingHandler(100)])
    speak_once()
    log = logging.getLogger("blip2train.test")
    monkeypatch.setattr(log, "level", logging.INFO)
    for is_main in (True, False):
        monkeypatch.setattr(distributed, "is_main", lambda answer=is_main: answer)
        log.info("said, main is %s", is_main)
        log.warning("warned, main is %s", is_main)
    assert [record.getMessage() for record in heard.buffer] == [
        "said, main is True",
        "warned, main is True",
        "warned, main is False",
    ]
