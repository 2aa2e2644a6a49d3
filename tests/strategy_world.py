"""Trainings on two gloo ranks under any strategy, many in one pair of processes; what a launcher sets is set here."""

from __future__ import annotations

import faulthandler
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from blip2train.cli.config import compose
from blip2train.cli.train import train
from blip2train.run_dir import RunDir
from tests.two_ranks import on_two_ranks

PATIENCE = int(os.environ.get("STRATEGY_TEST_SECONDS", "240"))


def train_on_two_ranks(own: Path, jobs: list[list[str]], ranks: Callable[..., None] | None = None) -> list[RunDir]:
    """Run each job, a list of overrides with `run_dir`, on both ranks, one after the other.

    Args:
        own: empty folder for the processes themselves.
        jobs: overrides of `blip2train train`.
        ranks: what each rank runs instead of `train_all`, with its arguments.
    """
    own.mkdir(parents=True, exist_ok=True)
    on_two_ranks(ranks or train_all, own, _free_port(), jobs)
    folders = [dict(item.split("=", 1) for item in job if "=" in item)["run_dir"] for job in jobs]
    return [RunDir(Path(folder)) for folder in folders]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def train_all(rank: int, port: int, jobs: list[list[str]]) -> None:
    """What each rank runs."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
        "BLIP2TRAIN_RUN_ID": "test",
    }  # fmt: skip
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # a rank that waits for ever says where
    linear = torch.nn.functional.linear
    for job in jobs:
        config = compose("train", job)
        outcome: Any = train(config, RunDir(Path(config.run_dir)))
        assert outcome.stopped_by is None
        assert torch.nn.functional.linear is linear  # one strategy's patches are not the next one's
        torch.distributed.barrier()
    faulthandler.cancel_dump_traceback_later()
