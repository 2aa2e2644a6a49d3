"""A log file on a full disk loses its lines and nothing else."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from blip2train.cli.log_file import outlive_full_disk


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
