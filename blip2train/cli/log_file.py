"""The log file of a run on a disk that is full: the console has every line, and no stack trace buries it."""

from __future__ import annotations

import functools
import logging
import sys


def outlive_full_disk() -> None:
    """Let the log files of this process lose lines in silence when the disk refuses them; other faults stay loud."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = functools.partial(_handle_error, handler)  # type: ignore[method-assign]


def _handle_error(handler: logging.FileHandler, record: logging.LogRecord) -> None:
    if not isinstance(sys.exc_info()[1], OSError):
        logging.FileHandler.handleError(handler, record)
