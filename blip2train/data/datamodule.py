"""Datasets, collator and counters -> the train loader that Lightning iterates: wiring only.

Implements exact resume: the state is the global number of samples that training has consumed, taken from the trainer's
own progress (which a prefetching loader cannot disturb), plus the settings that give the number its meaning. Ranks,
workers and batch size are not among them. Plain Lightning restarts the data on resume; LAVIS resumes whole epochs only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from blip2train import distributed
from blip2train.batch import Sample, Stage1Batch, Stage2Batch
from blip2train.data.drop import DropLedger
from blip2train.data.image_file import MAX_PIXELS
from blip2train.data.loader import ConsumedLedger, TrainLoader
from blip2train.data.mixture import Dataset, Mixture
from blip2train.data.shards import ShardCache
from blip2train.data.sharing import Shape, batch_per_device, check_readers
from blip2train.data.stream import PartStream
from blip2train.errors import ConfigError

Batch = Stage1Batch | Stage2Batch
Counts = dict[str, dict[str, int]]


class BlipDataModule(pl.LightningDataModule):
    """Endless training batches of a weighted mixture; `trainer.max_steps` is the clock.

    Args:
        datasets: name -> dataset.
        collator: list of samples -> batch; one that pads texts says with what, as `pad_id`.
        batch_size: samples per batch and rank; None where `global_batch_size` is given.
        num_workers: loader processes; changes speed, never the samples, not even on resume.
        seed: of the order, the mixture, the captions and the augmentation.
        global_batch_size: samples per batch over all ranks, instead of `batch_size`.
        num_streams: logical streams, which ranks x workers must divide.
        shuffle_window: records of a stream that are permuted among themselves.
        temperature: datasets share the samples as weight ** (1 / temperature).
        max_dropped_share: DataError when a dataset drops more than this share of its records.
        drop_log: JSONL file that names every dropped record.
        cache: of remote shards.
        max_pixels: images of more, by their header, are dropped undecoded.
        prefetch_factor: batches that the workers prepare ahead, together.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        collator: Callable[[list[Sample]], Batch],
        batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        global_batch_size: int | None = None,
        num_streams: int = 64,
        shuffle_window: int = 1000,
        temperature: float = 1.0,
        max_dropped_share: float = 0.1,
        drop_log: str | None = None,
        cache: ShardCache | None = None,
        max_pixels: int = MAX_PIXELS,
        prefetch_factor: int = 4,
    ) -> None:
        super().__init__()
        self.collator, self.num_workers, self.prefetch_factor = collator, num_workers, prefetch_factor
        self.batch_size, self.global_batch_size = batch_size, global_batch_size
        self.mixture = Mixture(
            list(datasets.values()),
            seed=seed,
            num_streams=num_streams,
            shuffle_window=shuffle_window,
            temperature=temperature,
            cache=cache,
            max_pixels=max_pixels,
        )
        names = [dataset.name for dataset in self.mixture.datasets]
        self._ledger = DropLedger(names, max_dropped_share, log=Path(drop_log) if drop_log else None)
        self._consumed = ConsumedLedger(self._ledger, lambda: self.num_batches_consumed)
        self._samples_before = self._batches_before = 0

    @property
    def num_batches_consumed(self) -> int:
        """Batches trained on since the first start of this run, on each rank; without a trainer, those handed out."""
        if self.trainer is None:
            return self._consumed.num_delivered
        # "processed" and not "completed": checkpoints are written between the two
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(progress.processed)

    @property
    def num_samples_consumed(self) -> int:
        """Samples trained on since the first start of this run, on all ranks together."""
        shape = self.shape()
        since = self.num_batches_consumed - self._batches_before
        return self._samples_before + since * shape.batch_size * shape.world_size

    def shape(self) -> Shape:
        """Ranks, workers and batch size of this process, as they are now.

        Raises:
            ConfigError: both batch sizes are given, or none, or the global one cannot be divided.
        """
        world_size = distributed.world_size()
        size = batch_per_device(self.batch_size, self.global_batch_size, world_size)
        return Shape(distributed.rank(), world_size, max(1, self.num_workers), size)

    def train_dataloader(self) -> TrainLoader[Batch]:
        """The loader of this rank.

        Raises:
            ConfigError: ranks x workers do not divide the streams, or ranks differ in what they are to read.
        """
        shape = self.shape()
        check_readers(self.mixture.num_streams, shape.world_size, shape.num_workers)
        self._check_ranks_agree()
        return TrainLoader(
            self._parts,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor,
            pad_id=getattr(self.collator, "pad_id", 0),
            start=lambda: self.num_batches_consumed,
            ledger=self._consumed,
        )

    def counters(self) -> Counts:
        """Records of the consumed samples of all ranks, used and dropped, by dataset and cause.

        To be called on every rank.
        """
        total: dict[str, Counter[str]] = {}
        for counts in distributed.gather_objects([self._consumed.counts()]):
            for name, row in counts.items():
                total.setdefault(name, Counter()).update(row)
        return {name: dict(row) for name, row in total.items()}

    def progress(self) -> dict[str, float]:
        """What training has consumed, for a log: `data/NAME/samples`, `.../epochs`, `.../dropped/CAUSE`.

        Samples of all ranks since the first start, those in the place of a dropped record included. To be called on
        every rank.
        """
        entry: dict[str, float] = {}
        counters = self.counters()
        for dataset, order in zip(self.mixture.datasets, self.mixture.orders, strict=True):
            counts = counters[dataset.name]
            entry[f"data/{dataset.name}/samples"] = sum(counts.values())
            entry[f"data/{dataset.name}/epochs"] = sum(counts.values()) / order.num_records
            for cause, number in counts.items():
                if number and cause != "used":
                    entry[f"data/{dataset.name}/dropped/{cause}"] = number
        return entry

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs; Lightning asks every rank for it."""
        return {
            "samples": self.num_samples_consumed,
            "batches": self.num_batches_consumed,
            "counters": self.counters(),
            **self.mixture.settings(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last consumed sample, whatever ranks, workers and batch size were.

        Raises:
            ConfigError: a setting differs that the order of the samples depends on, or the ranks cannot share what
                is left evenly.
        """
        changed = {
            name: (state_dict.get(name), value)
            for name, value in self.mixture.settings().items()
            if state_dict.get(name) != value
        }
        if changed:
            raise ConfigError(
                "; ".join(f"{name} was {old} in the checkpoint, is {new} now" for name, (old, new) in changed.items()),
                where="data (resume)",
                fix="resume with the old values, or start a new run from the weights alone (init_from)",
            )
        shape, samples = self.shape(), int(state_dict["samples"])
        check_readers(self.mixture.num_streams, shape.world_size, shape.num_workers)
        if samples % shape.world_size:
            raise ConfigError(
                f"{samples} samples were consumed, which is no multiple of {shape.world_size} ranks",
                where="trainer.devices (resume)",
                fix=f"resume with a number of ranks that divides {samples}",
            )
        self._samples_before = samples
        self._batches_before = self._consumed.num_delivered = int(state_dict["batches"])
        if shape.rank == 0:  # the counters are those of all ranks: counted once
            self._ledger.load(state_dict["counters"], samples)

    def _parts(self) -> PartStream[Batch]:
        return PartStream(self.mixture, self.collator, self.shape(), self.num_samples_consumed)

    def _check_ranks_agree(self) -> None:
        settings = {**self.mixture.settings(), "batch size": self.shape().batch_size, "workers": self.num_workers}
        found = distributed.gather_objects([settings])
        for rank, own in enumerate(found):
            differing = [f"{name} is {value} and {own[name]}" for name, value in found[0].items() if own[name] != value]
            if differing:
                raise ConfigError(
                    f"ranks 0 and {rank} differ: {'; '.join(differing)}",
                    where="data",
                    fix="start every rank with the same config and the same data",
                )
