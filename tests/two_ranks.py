"""Runs a function on several gloo processes of this machine and brings back what each returned."""

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
    return on_ranks(2, function, folder, *args)


def on_ranks(world: int, function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """The same in `world` processes."""
    # children fork from one clean process that has paid for the imports; plain spawn pays them for every child
    multiprocessing.set_forkserver_preload(["torch.distributed.nn.functional", "timm", "transformers", "pytest"])
    mp.start_processes(_worker, args=(world, function, str(folder), args), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _worker(rank: int, world: int, function: Callable[..., Any], folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
