"""Source shards -> shards of stored tokens: decode, encode, write, one shard after another.

Implements the evaluation transform and the frozen encoder over every record exactly once (paper, section 3.1). Each
source shard becomes one shard with as many records in the same order, whatever had to be dropped: a run draws the same
samples from either. Processes share the work by shards and meet in the files alone.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from blip2train.batch import Sample
from blip2train.data.drop import Drop, DropLedger
from blip2train.data.feature_cache import (
    FinishedShard,
    describe_source,
    finish_dataset,
    note_finished,
    read_finished,
    shard_path,
)
from blip2train.data.file_lock import take_lock
from blip2train.data.image_file import MAX_PIXELS
from blip2train.data.image_transform import Transform
from blip2train.data.sample import to_sample
from blip2train.data.shards import INDEX_NAME, RawRecord, Shard, ShardReader
from blip2train.data.stored_tokens import DROPPED, TOKENS
from blip2train.data.tar_shard import TarShard

log = logging.getLogger(__name__)

Encode = Callable[[Tensor], Tensor]
"""uint8 images (B, 3, h, w) -> stored tokens (B, P, C) uint8, both on the CPU."""

_TEXT_EXTENSIONS = ("json", "txt")
_BATCHES_AHEAD = 2


class FeatureWriter:
    """Writes the feature cache of any number of datasets.

    Args:
        transform: the evaluation transform; nothing of it may be random.
        encode: the encoder and the codec.
        batch_size: images per call of `encode`.
        num_threads: that decode images while the encoder runs.
        ledger: counts what is used and dropped, and stops the work past its budget.
        max_pixels: larger images are dropped undecoded, as in training.
    """

    def __init__(
        self,
        transform: Transform,
        encode: Encode,
        batch_size: int,
        num_threads: int,
        ledger: DropLedger,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._transform = transform
        self._encode = encode
        self._batch_size = batch_size
        self._num_threads = num_threads
        self._ledger = ledger
        self._max_pixels = max_pixels

    def write(
        self,
        name: str,
        reader: ShardReader,
        folder: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        progress: Callable[[int, int], None] = lambda records, num_bytes: None,
    ) -> bool:
        """Write the shards of one dataset that are not there yet.

        Args:
            name: of the dataset.
            reader: of its shards.
            folder: of its tokens.
            rank: takes the shards whose number is `rank` modulo `world_size`.
            world_size: number of processes.
            progress: called with the records and the bytes of tokens just written.

        Returns:
            Whether the dataset is whole now.

        Raises:
            DataError: the dropped share is too large, or the folder holds the tokens of other shards.
        """
        folder.mkdir(parents=True, exist_ok=True)
        sources = reader.shards
        own = range(rank, len(sources), world_size)
        missing = [index for index in own if read_finished(folder, index, sources[index]) is None]
        if missing:  # an index of fewer shards would call the dataset whole
            (folder / INDEX_NAME).unlink(missing_ok=True)
        for place, index in enumerate(missing):
            reader.prefetch(missing[place : place + 2])
            with _claimed(shard_path(folder, index)) as free:
                # what is free now may just have been written
                if not free or read_finished(folder, index, sources[index]) is not None:
                    continue
                records = (reader.record(index, number) for number in range(sources[index].num_records))
                finished = self._write_shard(name, sources[index], records, shard_path(folder, index), progress)
                note_finished(folder, index, finished)
        return finish_dataset(folder, sources)

    def _write_shard(
        self, name: str, source: Shard, records: Iterator[RawRecord], path: Path, progress: Callable[[int, int], None]
    ) -> FinishedShard:
        dropped: Counter[str] = Counter()
        # before it is read: one that is replaced meanwhile then differs from what is noted
        described = describe_source(source)
        samples = self._decoded(name, records)
        with TarShard(path, path.with_name(f".{path.name}.partial")) as shard:
            while batch := list(itertools.islice(samples, self._batch_size)):
                images = [sample.image for _, sample in batch if isinstance(sample, Sample)]
                encoded = self._encode(torch.stack(images)) if images else torch.empty(0)
                tokens = iter(encoded)
                drops = [sample for _, sample in batch if isinstance(sample, Drop)]
                for record, sample in batch:
                    if isinstance(sample, Drop):
                        reason = json.dumps([sample.cause, sample.detail]).encode()
                        shard.write(_placeholder_key(record, shard.num_records), {DROPPED: reason})
                    else:
                        texts = {extension: record[extension] for extension in _TEXT_EXTENSIONS if extension in record}
                        shard.write(record["__key__"], {TOKENS: next(tokens).numpy().tobytes(), **texts})
                self._ledger.add({name: len(batch)}, drops)
                dropped.update(drop.cause for drop in drops)
                progress(len(batch), encoded.nbytes)
            entry = shard.finish()
        return FinishedShard(entry=entry, dropped=dict(dropped), **described)

    def _decoded(self, name: str, records: Iterator[RawRecord]) -> Iterator[tuple[RawRecord, Sample | Drop]]:
        """Records in order, decoded by threads that stay a few batches ahead."""
        waiting: deque[tuple[RawRecord, Future[Sample | Drop]]] = deque()
        with ThreadPoolExecutor(self._num_threads) as pool:
            for record in records:
                # to_sample finds whatever training would find; its caption is not used
                done = pool.submit(
                    to_sample, record, name, self._transform, torch.Generator(), max_pixels=self._max_pixels
                )
                waiting.append((record, done))
                if len(waiting) > _BATCHES_AHEAD * self._batch_size:
                    first, decoded = waiting.popleft()
                    yield first, decoded.result()
            for record, decoded in waiting:
                yield record, decoded.result()


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Keep other calls from the shard that is to lie at `path`; False where one is writing it."""
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as file:
        try:
            free = take_lock(file)
        except OSError as error:
            free = True
            log.warning("%s is on a disk without locks (%s): see that only one call writes there", path.parent, error)
        try:
            yield free
        finally:
            if free:
                lock.unlink(missing_ok=True)


def _placeholder_key(record: RawRecord, place: int) -> str:
    """A key of its own: what is dropped may repeat the key before it, or have none that a tar could hold."""
    return f"{record['__key__']}#{place}".replace(".", "_").lstrip("_")
