"""An open file -> held by one process at a time: how the processes that share a folder keep out of each other's way.

Implements no part of the paper. A lock ends with its process, however that ends, so nobody ever waits for the dead.
LAVIS has no folder that two processes write.
"""

from __future__ import annotations

import fcntl
from typing import IO, Any


def take_lock(file: int | IO[Any], *, wait: bool = False) -> bool:
    """Take the lock of an open file; closing the file gives it back.

    Args:
        file: open in any mode; some network file systems want one that is open for writing.
        wait: until whoever holds it gives it back.

    Returns:
        False if another process holds it.

    Raises:
        OSError: it lies on a disk without locks; what that means is the caller's to say.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def release_lock(file: int | IO[Any]) -> None:
    """Give a lock back at once. Closing is not enough where a process was forked meanwhile: it holds the same lock."""
    fcntl.flock(file, fcntl.LOCK_UN)
