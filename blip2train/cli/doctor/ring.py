"""One process of the interconnect test: `python -m blip2train.cli.doctor.ring SETTINGS`, started by the doctor.

Times all-reduces of several sizes, a tiny one for the latency, and an all-to-all of the size of a step's negatives;
rank 0 writes the result. The sums are checked: a link that delivers wrong numbers has been seen.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blip2train import distributed
from blip2train.run_dir import write_json

REPEATS = 5
LATENCY_REPEATS = 50


def main() -> None:
    settings = json.loads(sys.argv[1])
    rank, world, local_rank = distributed.launched_as()
    device = torch.device("cpu")
    if settings["backend"] == "nccl":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        settings["backend"], rank=rank, world_size=world, timeout=timedelta(seconds=settings["timeout_s"])
    )
    result = measure(settings, device)
    if rank == 0:
        write_json(Path(settings["out"]), result)
    dist.barrier()
    dist.destroy_process_group()


def measure(settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds of each operation: the best of some, since others use the machine, too; on the slowest rank.

    Args:
        settings: `all_reduce`: sizes in bytes; `all_to_all`: bytes that each rank sends, None for no such test.
        device: of the tensors.
    """
    small = torch.ones(1, device=device)
    latency = _best(lambda: dist.all_reduce(small.fill_(1.0)), device, LATENCY_REPEATS)
    reduced = {str(size): _all_reduce(size, device) for size in settings["all_reduce"]}
    exchanged = None if settings["all_to_all"] is None else _all_to_all(settings["all_to_all"], device)
    return {
        "world_size": dist.get_world_size(),
        "latency_s": latency,
        "all_reduce_s": reduced,
        "all_to_all_bytes": settings["all_to_all"],
        "all_to_all_s": exchanged,
    }


def _all_reduce(size: int, device: torch.device) -> float:
    values = torch.empty(max(1, size // 4), device=device)
    seconds = _best(lambda: dist.all_reduce(values.fill_(1.0)), device, REPEATS)
    wrong = int((values != dist.get_world_size()).sum())
    if wrong:
        raise RuntimeError(f"all-reduce of {size} bytes gave {wrong} wrong numbers on rank {dist.get_rank()}")
    return seconds


def _all_to_all(size: int, device: torch.device) -> float:
    world = dist.get_world_size()
    sent = torch.full((world, max(1, size // world)), dist.get_rank(), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    seconds = _best(lambda: dist.all_to_all_single(received, sent), device, REPEATS)
    expected = torch.arange(world, dtype=torch.uint8, device=device)[:, None]
    if bool((received != expected).any()):
        raise RuntimeError(f"all-to-all of {size} bytes gave wrong numbers on rank {dist.get_rank()}")
    return seconds


def _best(action: Callable[[], Any], device: torch.device, repeats: int) -> float:
    action()
    seconds: list[float] = []
    for _ in range(repeats):
        dist.barrier()
        _wait(device)
        start = time.perf_counter()
        action()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    slowest: Tensor = torch.tensor(min(seconds), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
