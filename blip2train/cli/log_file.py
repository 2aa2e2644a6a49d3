"""What a run's processes write to console and log file: each line once, and nothing else on a disk that is full."""

from __future__ import annotations

import functools
import logging
import sys


def outlive_full_disk() -> None:
    """Let the log files of this process lose lines in silence when the disk refuses them; other faults stay loud."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = functools.partial(_handle_error, handler)  # type: ignore[method-assign]


def speak_once() -> None:
    """Leave what every rank has to say to the main one, once ranks know of each other; warnings come from all."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_for_this_rank)


def _is_for_this_rank(record: logging.LogRecord) -> bool:
    from blip2train import distributed  # here: it imports torch, which --help does not wait for

    return record.levelno > logging.INFO or distributed.is_main()


def _handle_error(handler: logging.FileHandler, record: logging.LogRecord) -> None:
    if not isinstance(sys.exc_info()[1], OSError):
        logging.FileHandler.handleError(handler, record)
