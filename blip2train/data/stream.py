"""The sample order, one rank and one loader worker -> that worker's parts of the rank's batches.

Implements the dealing of samples: sample g of the run belongs to rank g mod W; its rank counts it as c = g // W, row
c mod B of a batch of B; worker c mod K of K reads it. W * K divides the number of streams, so that a stream has one
reader. Neither ranks nor workers nor the batch size have a say in which record sample g is. LAVIS gives every worker
its own random draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from blip2train.batch import Sample
from blip2train.data.drop import Drop
from blip2train.data.mixture import Draw, Mixture
from blip2train.data.reader import SampleReader, with_sample_number
from blip2train.data.remote import is_remote
from blip2train.data.sharing import Shape, check_readers
from blip2train.errors import Blip2TrainError

BatchT = TypeVar("BatchT")

_OPEN_PER_STREAM = 3
_OPEN_AT_LEAST = 64


@dataclass(slots=True)
class Part(Generic[BatchT]):
    """What one worker brings to one batch.

    Args:
        rows: its rows, collated; None where no row of the batch is its own.
        first: place of its first row in the batch; the others follow in steps of the number of workers.
        drawn: records taken in their own turn, by dataset.
        drops: those of them that were replaced.
    """

    rows: BatchT | None
    first: int
    drawn: Mapping[str, int]
    drops: list[Drop]


class PartStream(IterableDataset[Part[BatchT]], Generic[BatchT]):
    """Endless parts of one rank's batches; each worker of a DataLoader yields its own, one per batch.

    Args:
        mixture: the sample order.
        collate: list of samples -> rows.
        shape: ranks, workers and batch size.
        first_sample: global number of samples consumed before, a multiple of the number of ranks.
    """

    def __init__(
        self, mixture: Mixture, collate: Callable[[list[Sample]], BatchT], shape: Shape, first_sample: int
    ) -> None:
        check_readers(mixture.num_streams, shape.world_size, shape.num_workers)
        assert first_sample % shape.world_size == 0
        self._mixture, self._collate, self._shape = mixture, collate, shape
        self._first = first_sample // shape.world_size

    def __iter__(self) -> Iterator[Part[BatchT]]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        assert num_workers == self._shape.num_workers
        readers = self._readers()
        streams: dict[int, Iterator[Draw]] = {}
        start = self._first
        while True:
            end = start + self._shape.batch_size
            own = range(start + (worker - start) % num_workers, end, num_workers)
            yield self._part(own, start, readers, streams)
            start = end

    def _part(
        self, own: range, start: int, readers: list[SampleReader], streams: dict[int, Iterator[Draw]]
    ) -> Part[BatchT]:
        samples: list[Sample] = []
        drops: list[Drop] = []
        drawn: Counter[str] = Counter()
        for local in own:
            number = local * self._shape.world_size + self._shape.rank
            position, stream = divmod(number, self._mixture.num_streams)
            if stream not in streams:
                streams[stream] = self._mixture.draws(stream, position)
            draw = next(streams[stream])
            sample, dropped = readers[draw.dataset].sample(draw.stream, draw.number)
            samples.append(sample)
            drawn[self._mixture.datasets[draw.dataset].name] += 1
            if dropped is not None:
                drops.append(with_sample_number(dropped, number))
        rows = self._collate(samples) if samples else None
        return Part(rows, own.start - start, dict(drawn), drops)

    def _readers(self) -> list[SampleReader]:
        mixture = self._mixture
        own_streams = mixture.num_streams // (self._shape.world_size * self._shape.num_workers)
        max_open = max(_OPEN_AT_LEAST, _OPEN_PER_STREAM * own_streams)
        return [
            SampleReader(
                mixture.reader(number, max_open),
                order,
                name=dataset.name,
                transform=dataset.transform,
                seed=mixture.seed,
                max_pixels=mixture.max_pixels,
                fetch_ahead=any(is_remote(shard.url) for shard in mixture.shards[number]),
            )
            for number, (dataset, order) in enumerate(zip(mixture.datasets, mixture.orders, strict=True))
        ]


class GuardedParts(IterableDataset[Part[BatchT] | Blip2TrainError], Generic[BatchT]):
    """Hands our errors over as values: a DataLoader rebuilds exceptions from one string and would lose their parts."""

    def __init__(self, parts: PartStream[BatchT]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Part[BatchT] | Blip2TrainError]:
        try:
            yield from self._parts
        except Blip2TrainError as error:
            if get_worker_info() is None:
                raise
            yield error
