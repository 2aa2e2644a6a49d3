"""Parts of all workers -> batches in order, and accounts of the batches that training has consumed.

Implements what a prefetching loader takes away: counters that belong to the trained batches alone, so that a
checkpoint holds neither more nor less than what its weights have seen. Plain Lightning restarts the data on resume.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader

from blip2train.data.assemble import assemble
from blip2train.data.drop import Drop, DropLedger
from blip2train.data.stream import GuardedParts, Part, PartStream
from blip2train.errors import Blip2TrainError

BatchT = TypeVar("BatchT")


class ConsumedLedger:
    """Holds back what delivered batches drew and dropped until they are consumed.

    Args:
        ledger: counts consumed batches.
        consumed: number of batches consumed so far.
    """

    def __init__(self, ledger: DropLedger, consumed: Callable[[], int]) -> None:
        self.num_delivered = 0
        self._ledger, self._consumed = ledger, consumed
        self._delivered: deque[tuple[int, list[tuple[Mapping[str, int], list[Drop]]]]] = deque()

    def restart(self) -> None:
        """Forget delivered batches: whoever iterates anew starts behind the consumed ones."""
        self.settle()
        self._delivered.clear()

    def deliver(self, number: int, parts: list[Part[Any]]) -> None:
        """Note a batch that is about to be handed out."""
        self.settle()
        self._delivered.append((number, [(part.drawn, part.drops) for part in parts]))
        self.num_delivered = number + 1

    def settle(self) -> None:
        """Count the batches that were consumed since.

        Raises:
            DataError: too many records of a dataset were dropped.
        """
        consumed = self._consumed()
        while self._delivered and self._delivered[0][0] < consumed:
            for drawn, drops in self._delivered.popleft()[1]:
                self._ledger.add(drawn, drops)

    def counts(self) -> dict[str, dict[str, int]]:
        """Records of the consumed batches of this rank, used and dropped, by dataset and cause."""
        self.settle()
        return self._ledger.counts()


class TrainLoader(Generic[BatchT]):
    """Iterates one rank's batches, from wherever the run stands when iteration starts.

    Args:
        parts: makes the stream of parts behind the consumed samples.
        num_workers: loader processes; 0 reads in this one.
        prefetch_factor: batches that the workers prepare ahead, together.
        pad_id: fills up short texts.
        start: number of batches consumed so far.
        ledger: told of every batch.
    """

    def __init__(
        self,
        parts: Callable[[], PartStream[BatchT]],
        *,
        num_workers: int,
        prefetch_factor: int,
        pad_id: int,
        start: Callable[[], int],
        ledger: ConsumedLedger,
    ) -> None:
        self._parts, self._start, self._ledger = parts, start, ledger
        self._num_workers, self._prefetch_factor, self._pad_id = num_workers, prefetch_factor, pad_id

    def __iter__(self) -> Iterator[BatchT]:
        self._ledger.restart()
        loader = DataLoader(
            GuardedParts(self._parts()),
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_factor if self._num_workers else None,
            collate_fn=_unchanged,
            # a DataLoader seeds its workers from the global generator otherwise, and shifts the model's dropout
            generator=torch.Generator(),
        )
        items = iter(loader)  # in turn from worker 0, 1, ...: one part of each makes a batch
        pin = torch.cuda.is_available()
        try:
            for number in count(self._start()):
                parts = [_part(next(items)) for _ in range(max(1, self._num_workers))]
                batch = assemble(parts, pad_id=self._pad_id, pin=pin)
                self._ledger.deliver(number, parts)
                yield batch
        finally:
            del items  # ends the workers now: an error's traceback would keep them until it is collected


def _part(item: Part[BatchT] | Blip2TrainError) -> Part[BatchT]:
    if isinstance(item, Blip2TrainError):
        raise item
    return item


def _unchanged(item: Any) -> Any:
    return item
