"""Datasets, collator and counters -> the train loader that Lightning iterates: wiring only.

Implements exact resume: the state is the number of batches this run has consumed, taken from the trainer's own progress
(which a prefetching loader cannot disturb), plus the settings that give the number its meaning. Plain Lightning
restarts the data on resume; LAVIS resumes whole epochs only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from blip2train import distributed
from blip2train.batch import Sample, Stage1Batch, Stage2Batch
from blip2train.data.mixture import Dataset, Mixture
from blip2train.errors import Blip2TrainError, ConfigError

Batch = Stage1Batch | Stage2Batch


class BlipDataModule(pl.LightningDataModule):
    """Endless training batches of a weighted mixture; `trainer.max_steps` is the clock.

    Args:
        datasets: name -> dataset.
        collator: list of samples -> batch.
        batch_size: samples per batch and rank.
        num_workers: loader processes; changes speed, never the batches, not even on resume.
        seed: of the order, the mixture, the captions and the augmentation.
        shuffle_buffer: encoded records held back per dataset and logical stream.
        num_streams: logical streams per rank; None chooses by the size of the data.
        max_dropped_share: DataError when a dataset drops more than this share of its records.
        prefetch_factor: batches each worker prepares ahead.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        collator: Callable[[list[Sample]], Batch],
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        num_streams: int | None = None,
        max_dropped_share: float = 0.1,
        prefetch_factor: int = 2,
    ) -> None:
        super().__init__()
        self.datasets = dict(datasets)
        self.collator = collator
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.num_streams = num_streams
        self.max_dropped_share = max_dropped_share
        self.prefetch_factor = prefetch_factor
        self._mixture: Mixture[Batch] | None = None
        self._resumed_at = 0

    @property
    def num_batches_consumed(self) -> int:
        """Batches trained on since the first start of this run, on each rank."""
        if self.trainer is None:
            return self._resumed_at
        # "processed" and not "completed": checkpoints are written between the two
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(progress.processed)

    def mixture(self) -> Mixture[Batch]:
        """The stream of this rank; made anew if it was first asked for before the process group existed."""
        ranks = (distributed.rank(), distributed.world_size())
        if self._mixture is None or (self._mixture.rank, self._mixture.world_size) != ranks:
            self._mixture = Mixture(
                list(self.datasets.values()),
                self.collator,
                batch_size=self.batch_size,
                seed=self.seed,
                shuffle_buffer=self.shuffle_buffer,
                num_streams=self.num_streams,
                max_dropped_share=self.max_dropped_share,
                rank=ranks[0],
                world_size=ranks[1],
                num_workers=self.num_workers,
            )
        return self._mixture

    def train_dataloader(self) -> TrainLoader:
        return TrainLoader(
            self.mixture(),
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor,
            start=lambda: self.num_batches_consumed,
        )

    def counters(self) -> dict[str, dict[str, int]]:
        """Records used and dropped so far on this rank, by dataset and cause."""
        return self.mixture().counters()

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.num_batches_consumed, **self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last consumed batch.

        Raises:
            ConfigError: a setting differs that the order of the samples depends on.
        """
        changed = {
            name: (state_dict.get(name), value)
            for name, value in self._settings().items()
            if state_dict.get(name) != value
        }
        if changed:
            raise ConfigError(
                "; ".join(f"{name} was {old} in the checkpoint, is {new} now" for name, (old, new) in changed.items()),
                where="data (resume)",
                fix="resume with the old values, or start a new run from the weights alone (init_from)",
            )
        self._resumed_at = int(state_dict["batches"])

    def _settings(self) -> dict[str, Any]:
        mixture = self.mixture()
        return {
            "world_size": mixture.world_size,
            "batch_size": mixture.batch_size,
            "num_streams": mixture.num_streams,
            "seed": mixture.seed,
            "datasets": mixture.fingerprint(),
        }


class TrainLoader:
    """Iterates a mixture in worker processes, from wherever the run stands when iteration starts.

    Args:
        mixture: the stream of this rank.
        num_workers: loader processes; 0 reads in this one.
        prefetch_factor: batches each worker prepares ahead.
        start: number of batches consumed so far.
    """

    def __init__(
        self, mixture: Mixture[Batch], num_workers: int, prefetch_factor: int, start: Callable[[], int]
    ) -> None:
        self._mixture = mixture
        self._num_workers = num_workers
        self._prefetch_factor = prefetch_factor
        self._start = start

    def __iter__(self) -> Iterator[Batch]:
        self._mixture.first_batch = self._start()
        loader = DataLoader(
            _Guarded(self._mixture),
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_factor if self._num_workers else None,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_unchanged,
            # a DataLoader seeds its workers from the global generator otherwise, and shifts the model's dropout
            generator=torch.Generator(),
        )
        for item in loader:
            if isinstance(item, Blip2TrainError):
                raise item
            yield item


def _unchanged(item: Any) -> Any:
    return item


class _Guarded(IterableDataset[Batch | Blip2TrainError]):
    """Hands our errors over as values: a DataLoader rebuilds exceptions from one string and would lose their parts."""

    def __init__(self, mixture: Mixture[Batch]) -> None:
        self._mixture = mixture

    def __iter__(self) -> Iterator[Batch | Blip2TrainError]:
        try:
            yield from self._mixture
        except Blip2TrainError as error:
            if get_worker_info() is None:
                raise
            yield error
