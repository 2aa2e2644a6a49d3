"""Through the real loaders, and two real processes for two ranks: one sequence of samples, whoever reads it."""

import multiprocessing
import random
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from shard_factory import plain, write_shards
from two_ranks import on_two_ranks

from blip2train import distributed
from blip2train.batch import Sample, Stage1Batch
from blip2train.data.datamodule import BlipDataModule
from blip2train.data.mixture import Dataset

GLOBAL_BATCH = 12
SHAPES = ((1, 0), (1, 4), (2, 2))
"""(ranks, workers): the three of which every pair must agree."""


Segment = tuple[tuple[int, int], int, int, bool]
"""Shape, batches consumed, batches lost by the kill, and whether it is a new run."""


def collate(samples: list[Sample]) -> Stage1Batch:
    """The pixel that shows what the augmentation drew goes with the key."""
    return Stage1Batch(
        pixel_values=torch.stack([sample.image for sample in samples]),
        input_ids=torch.zeros(len(samples), 1, dtype=torch.int64),
        attention_mask=torch.ones(len(samples), 1, dtype=torch.bool),
        image_ids=torch.tensor([sample.image_id for sample in samples]),
        keys=[f"{sample.key} {sample.caption} {int(sample.image[0, 0, 0])}" for sample in samples],
    )


def datamodule(folder: Path, num_workers: int) -> BlipDataModule:
    return BlipDataModule(
        {name: Dataset(name, str(folder / name), plain, weight) for name, weight in (("x", 2.0), ("y", 1.0))},
        collate,
        num_workers=num_workers,
        seed=3,
        global_batch_size=GLOBAL_BATCH,
        num_streams=16,
        shuffle_window=4,
        max_dropped_share=0.5,
        prefetch_factor=2,
    )


def read(folder: Path, num_workers: int, state: dict[str, Any] | None, consumed: int, lost: int) -> Any:
    """Go on from `state`: batches up to a checkpoint, and some behind it that a kill takes away."""
    data = datamodule(folder, num_workers)
    if state is not None:
        data.load_state_dict(state)
    batches = iter(data.train_dataloader())
    keys = [key for batch in islice(batches, consumed) for key in batch.keys]
    saved = data.state_dict()
    for _ in islice(batches, lost):
        pass
    return keys, saved


def run_plan(rank: int, folder: Path, plan: list[Segment]) -> list[tuple[list[str], dict[str, Any]]]:
    """Pieces of one run, each in its own shape: the global sequence of samples of each, and the state it leaves.

    Where a piece has one rank, rank 0 reads as if it were alone, and the other one is told the state.
    """
    # loader workers start as under a launcher; a child of the forkserver would give each a fresh interpreter
    multiprocessing.set_start_method("fork", force=True)
    found = []
    state: dict[str, Any] | None = None
    for (ranks, workers), consumed, lost, anew in plan:
        state = None if anew else state
        if ranks == 2:
            results = distributed.gather_objects([read(folder, workers, state, consumed, lost)])
        else:
            alone = []
            if rank == 0:
                with mock.patch.multiple(
                    distributed, world_size=lambda: 1, rank=lambda: 0, gather_objects=lambda local: local
                ):
                    alone = [read(folder, workers, state, consumed, lost)]
            results = distributed.gather_objects(alone)
        assert all(saved == results[0][1] for _, saved in results)
        state = results[0][1]
        found.append(
            ([key for together in zip(*(keys for keys, _ in results), strict=True) for key in together], state)
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    write_shards(path / "x", [19, 18, 40], name="x")
    write_shards(path / "y", [16, 16], name="y", broken={2: b"broken", 20: b""})
    return path


def killed(kills: int) -> list[Segment]:
    """A run with random ends, each resumed in a random shape; then all of it again in one go."""
    chance = random.Random(kills)
    plan: list[Segment] = []
    for number in range(kills + 1):
        plan.append((chance.choice(SHAPES), chance.randrange(1, 9), chance.randrange(4), number == 0))
    return [*plan, ((1, 0), sum(consumed for _, consumed, _, _ in plan), 0, True)]


def check_killed(found: list[tuple[list[str], dict[str, Any]]]) -> None:
    *pieces, (whole, expected) = found
    assert [key for keys, _ in pieces for key in keys] == whole
    assert pieces[-1][1] == expected, "counters, too"


def test_any_shape_reads_one_sequence_also_when_killed_and_resumed_in_another(folder: Path, tmp_path: Path) -> None:
    whole: list[Segment] = [(shape, 10, 0, True) for shape in SHAPES]
    found, *_ = on_two_ranks(run_plan, tmp_path, folder, [*whole, *killed(4)])
    first_keys, first_state = found[0]
    assert len(first_keys) == 10 * GLOBAL_BATCH
    assert all(keys == first_keys and state == first_state for keys, state in found[:3])
    assert sum(sum(row.values()) for row in first_state["counters"].values()) == 10 * GLOBAL_BATCH
    check_killed(found[3:])


@pytest.mark.slow
def test_a_run_killed_at_twenty_points_loses_and_repeats_no_sample(folder: Path, tmp_path: Path) -> None:
    check_killed(on_two_ranks(run_plan, tmp_path, folder, killed(20))[0])
