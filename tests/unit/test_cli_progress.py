"""What long work says about how far it has come."""

import logging

import pytest

from blip2train.cli import progress
from blip2train.cli.progress import Rate, show_progress


def test_the_rate_leaves_out_what_an_earlier_run_had_done() -> None:
    rate = Rate()
    rate.update(1000, 5000, 0, when=50.0)
    assert rate.text() == ""
    rate.update(1400, 5000, 8_000_000, when=60.0)
    assert rate.text() == "40/s, 0.8 MB/s, 0:01:30 left"


def test_slow_work_of_unknown_length_has_a_rate_and_no_end() -> None:
    rate = Rate()
    rate.update(0, None, None, when=0.0)
    rate.update(3, None, None, when=2.0)
    assert rate.text() == "1.5/s"


def test_a_log_file_gets_a_line_now_and_then(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO), show_progress("packing") as show:
        show(0, 2000)
        show(1500, 2000)
    assert "packing: 1,500 of 2,000" in caplog.text and "left" in caplog.text
