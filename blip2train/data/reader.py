"""Draws of one dataset -> decoded samples, with replacements for records that cannot be used.

Implements the rule that keeps the order independent of what is broken: a dropped record gives its place to another one
that the draw alone decides, and is counted in its own turn alone. Randomness is keyed by (seed, dataset, epoch, key):
LAVIS draws from the worker's global generators, so that a sample's augmentation depends on who read it and what was
read before.
"""

from __future__ import annotations

from dataclasses import replace

from blip2train.batch import Sample
from blip2train.data.drop import Drop
from blip2train.data.image_file import MAX_PIXELS
from blip2train.data.image_transform import Transform
from blip2train.data.keyed import keyed_generator
from blip2train.data.order import DatasetOrder, Place
from blip2train.data.sample import to_sample
from blip2train.data.shards import ShardReader
from blip2train.data.stored_tokens import StoredTokens
from blip2train.errors import DataError

_MAX_ATTEMPTS = 1000


class SampleReader:
    """Reads the samples of one dataset in one process.

    Args:
        reader: of the dataset's shards.
        order: of the dataset's records.
        name: of the dataset.
        transform: training augmentation; `StoredTokens` for shards of a feature cache.
        seed: of the run.
        max_pixels: images of more are dropped undecoded.
        fetch_ahead: let the shards come that a stream needs next; for remote ones.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: DatasetOrder,
        *,
        name: str,
        transform: Transform | StoredTokens,
        seed: int,
        max_pixels: int = MAX_PIXELS,
        fetch_ahead: bool = False,
    ) -> None:
        self._reader, self._order = reader, order
        self._name, self._transform, self._seed = name, transform, seed
        self._max_pixels, self._fetch_ahead = max_pixels, fetch_ahead
        self._fetched_to: dict[int, int] = {}

    def sample(self, stream: int, draw: int) -> tuple[Sample, Drop | None]:
        """The sample of a draw, and what was dropped if it had to be replaced.

        Args:
            stream: logical stream.
            draw: number of the draw from this dataset in its stream.

        Raises:
            DataError: none of many replacements can be used, or a remote shard cannot be fetched.
        """
        if self._fetch_ahead and draw >= self._fetched_to.get(stream, 0):
            self._fetch(stream, draw)
        place = self._order.record(stream, draw)
        found = self._read(place)
        if isinstance(found, Sample):
            return found, None
        tried = {place}
        for attempt in range(_MAX_ATTEMPTS):
            place = self._order.replacement(stream, draw, attempt)
            if place in tried:
                continue
            tried.add(place)
            other = self._read(place)
            if isinstance(other, Sample):
                return other, found
        raise DataError(
            f"none of {len(tried)} records of dataset {self._name} can be used; the first is dropped as {found.cause}: "
            f"{found.detail}",
            where=f"{found.url} key {found.key}",
            fix="`blip2train data check` names every defect; repair or repack the dataset",
        )

    def _read(self, place: Place) -> Sample | Drop:
        record = self._reader.record(place.shard, place.index)
        generator = keyed_generator(f"{self._seed}/{self._name}/sample/{place.epoch}/{record['__key__']}")
        return to_sample(record, self._name, self._transform, generator, place.epoch, self._max_pixels)

    def _fetch(self, stream: int, draw: int) -> None:
        """On entering a window, ask for its shards and those of the next one."""
        end = self._order.window_end(stream, draw)
        self._fetched_to[stream] = end
        wanted = self._order.shards_of_window(stream, draw) + self._order.shards_of_window(stream, end)
        self._reader.prefetch(dict.fromkeys(wanted))


def with_sample_number(drop: Drop, number: int) -> Drop:
    """A drop that says which sample of the run it would have been."""
    return replace(drop, sample=number)
