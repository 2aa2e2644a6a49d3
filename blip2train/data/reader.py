"""Undecoded records of one dataset -> decoded samples, with replacements for those that cannot be used.

Implements the rule that keeps positions independent of what is broken: a dropped record is replaced by one of the next
usable ones, which is seen again in its own turn. Randomness is keyed by (seed, dataset, stream epoch, key): LAVIS draws
from the worker's global generators, so that a sample's augmentation depends on who read it and what was read before.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator

import torch

from blip2train.batch import Sample
from blip2train.data.drop import Drop, DropCounter
from blip2train.data.image_transform import Transform
from blip2train.data.sample import to_sample
from blip2train.data.shards import RawRecord
from blip2train.errors import DataError

_MAX_LOOKAHEAD = 1000


class RecordReader:
    """Takes records of one dataset in order, and can look ahead for replacements.

    Args:
        records: (stream epoch, record), endless.
        name: of the dataset.
        transform: training augmentation.
        seed: of the run.
        counter: counts each record in its own turn.
    """

    def __init__(
        self,
        records: Iterator[tuple[int, RawRecord]],
        *,
        name: str,
        transform: Transform,
        seed: int,
        counter: DropCounter,
    ) -> None:
        self._records = records
        self._ahead: deque[tuple[int, RawRecord]] = deque()
        self._num_looked = 0
        self._name = name
        self._transform = transform
        self._seed = seed
        self._counter = counter

    def take(self) -> tuple[int, RawRecord]:
        """The next (stream epoch, record), consumed."""
        return self._ahead.popleft() if self._ahead else next(self._records)

    def decode(self, epoch: int, record: RawRecord) -> Sample | None:
        """The sample of a taken record; None, counted and logged, if it cannot be used."""
        sample = self._to_sample(epoch, record)
        if isinstance(sample, Drop):
            self._counter.drop(sample)
            return None
        self._counter.keep()
        return sample

    def rewind_lookahead(self) -> None:
        """Look for replacements from the first record after the batch again."""
        self._num_looked = 0

    def replacement(self) -> Sample:
        """The next usable record after the batch; it is not consumed, and not counted before its own turn."""
        record: RawRecord = {}
        for _ in range(_MAX_LOOKAHEAD):
            if self._num_looked == len(self._ahead):
                self._ahead.append(next(self._records))
            epoch, record = self._ahead[self._num_looked]
            self._num_looked += 1
            sample = self._to_sample(epoch, record)
            if not isinstance(sample, Drop):
                return sample
        raise DataError(
            f"{_MAX_LOOKAHEAD} records in a row of dataset {self._name} cannot be used",
            where=f"{record['__url__']} key {record['__key__']}",
            fix="the log names the first causes; repair or repack the dataset",
        )

    def _to_sample(self, epoch: int, record: RawRecord) -> Sample | Drop:
        generator = keyed_generator(f"{self._seed}/{self._name}/sample/{epoch}/{record['__key__']}")
        return to_sample(record, self._name, self._transform, generator, epoch)


def keyed_generator(key: str) -> torch.Generator:
    """A generator that depends on nothing but the key."""
    # torch seeds its CPU generator with 32 bits
    return torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:4], "big")
    )
