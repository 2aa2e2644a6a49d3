"""Several processes of one command on one machine, each with a GPU of its own, that share nothing but files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from blip2train.errors import ConfigError

if TYPE_CHECKING:
    import torch


def choose_device(name: str, local_rank: int) -> torch.device:
    """`auto` gives every process of a machine a GPU of its own, as long as there are some.

    Raises:
        ConfigError: no such device.
    """
    import torch

    if name == "auto" and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"no device {name!r}", where="device", fix="auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name} where torch finds {torch.cuda.device_count()} GPUs", where="device", fix="auto or cpu"
        )
    return device


def count_children(wanted: int | str, world: int, device: str) -> int:
    """How many further processes this call is to start on its machine.

    Args:
        wanted: processes in all, or "auto": one per GPU.
        world: processes that a launcher started already.
        device: "auto", or the one that all of them share.

    Raises:
        ConfigError: no such number, or not the launcher's.
    """
    import torch

    if wanted == "auto":
        return max(1, torch.cuda.device_count()) - 1 if world == 1 and device == "auto" else 0
    if not isinstance(wanted, int) or wanted < 1:
        raise ConfigError(f"num_processes={wanted!r}", where="num_processes", fix="give 1 or more, or auto")
    if world == 1:
        return wanted - 1
    if wanted != world:
        raise ConfigError(
            f"num_processes={wanted} where a launcher started {world}",
            where="num_processes",
            fix="leave it out: torchrun or srun says how many there are",
        )
    return 0


@contextmanager
def children(module: str, number: int) -> Iterator[None]:
    """Start `python -m module` with this command's arguments `number` more times, as ranks 1, 2, ...

    They are waited for at the end of the block, and taken along on an error.
    """
    command = [sys.executable, "-m", module, *sys.argv[1:]]
    started: list[subprocess.Popen[bytes]] = []
    if number:  # a scheduler's end of time, too, reaches the children
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for rank in range(1, number + 1):
            place = {"RANK": str(rank), "WORLD_SIZE": str(number + 1), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(command, env=os.environ | place))
        yield
        failed = [child.returncode for child in started if child.wait()]
        if failed:
            raise ConfigError(
                f"{len(failed)} of {number + 1} processes failed (exit status {failed[0]})",
                where="num_processes",
                fix="see their messages above; repeating the command continues",
            )
    finally:
        for child in started:
            if child.poll() is None:
                child.terminate()
        for child in started:
            child.wait()
