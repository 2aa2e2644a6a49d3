"""Runs a function on two gloo processes of this machine and brings back what each returned."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_two_ranks(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Call `function(rank, *args)`, a module-level function, in both; its result must survive `torch.save`."""
    # children fork from one clean process that has paid for the imports; plain spawn pays them for every child
    multiprocessing.set_forkserver_preload(["torch.distributed.nn.functional", "timm", "transformers", "pytest"])
    mp.start_processes(_worker, args=(function, str(folder), args), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _worker(rank: int, function: Callable[..., Any], folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
