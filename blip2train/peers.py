"""The other ranks as one of them sees them: agreeing on a number without asking the device, noticing that one is gone.

Through the store of the rendezvous, which every launcher sets up for every backend. NCCL's collectives would make the
host wait for the device at each step, as Lightning 2.6 does; a second group over gloo needs a network interface that
gloo may not find. LAVIS has neither: a dead rank leaves the others waiting for the year its timeout is set to.
"""

from __future__ import annotations

import logging
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

log = logging.getLogger(__name__)

COUNT_BITS = 20
"""Of a step's sum in the store: below them the number of ranks that have spoken, above them who said 1, who said 2."""
_LOST_SIGNS = (
    *("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe"),
    *("application timeout", "socket timeout", "timed out waiting", "wait timeout"),
    *("nccl communicator was aborted", "remote process exited"),
)
"""What gloo, NCCL and the store say, in lower case, when the other end does not answer any more."""


class Agreement:
    """The largest number that any rank has said, known to all of them after the same call.

    Every rank calls `say` equally often. What one says comes back from the next call, so that no rank waits for a
    slower one before it has started its next step. Two short requests to the store per call.

    Args:
        name: of the subject, so that several do not mix.
    """

    def __init__(self, name: str) -> None:
        self._world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._calls = 0
        if self._world > 1:
            self._rank = dist.get_rank()
            self._store = PrefixStore(f"blip2train/{name}", _get_default_store())

    def say(self, value: int) -> int:
        """Say 0, 1 or 2; returns the largest that a rank said in the call before (in this one, on a single process).

        Raises:
            RuntimeError: a rank has not come to the call before within the timeout of the process group, or the store
                is gone.
        """
        if self._world == 1:
            return value
        call, self._calls = self._calls, self._calls + 1
        spoken = self._store.add(f"{call}", 1 + (1 << COUNT_BITS * value if value else 0))
        if spoken % (1 << COUNT_BITS) == self._world:
            self._store.set(f"{call}/all", str(spoken))
        if call == 0:
            return 0
        said = int(self._store.get(f"{call - 1}/all")) >> COUNT_BITS
        if self._rank == 0 and call >= 3:  # every rank has read what lies three calls back
            self._store.delete_key(f"{call - 3}")
            self._store.delete_key(f"{call - 3}/all")
        return 2 if said >> COUNT_BITS else min(said, 1)


class LastWord:
    """The main rank ends a run last; the others wait for it, for launchers take all ranks along when one has left."""

    def __init__(self) -> None:
        self._store = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._store, self._main = PrefixStore("blip2train/end", _get_default_store()), dist.get_rank() == 0

    def wait(self, seconds: float) -> None:
        """The main rank says that it is done; others wait for that, `seconds` at most or until the store is gone."""
        if self._store is None:
            return
        try:
            if self._main:
                self._store.set("done", "1")
            else:
                self._store.wait(["done"], timedelta(seconds=seconds))
        except RuntimeError as error:
            log.debug("left without the main rank's word: %s", error)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that another rank does not answer any more."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, dist.DistError):
            return True
        if isinstance(cause, RuntimeError) and any(sign in str(cause).lower() for sign in _LOST_SIGNS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
