"""The processes that this command consists of, one or those of torchrun or srun, and places for their children to meet.

A check that needs all of them (interconnect, step) starts a child process in each, which meet at an address of their
own: the one of the launcher is taken by the doctor itself, to bring the results together.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from blip2train.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

SECONDS_TO_MEET = 120.0


class Launch:
    """Who this process is, and the way to the others.

    They share a store of strings and no process group: what a check builds here takes itself for a single process.

    Args:
        rank, world, local_rank: as the launcher states them; (0, 1, 0) without one.
        address: of rank 0's machine.
        store: of a launch of several.
        timeout_s: longest wait for another process.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        local_rank: int = 0,
        *,
        address: str = "127.0.0.1",
        store: Store | None = None,
        timeout_s: float = SECONDS_TO_MEET,
    ) -> None:
        self.rank, self.world, self.local_rank, self.address = rank, world, local_rank, address
        self._store, self._timeout = store, timedelta(seconds=timeout_s)
        self._exchanges = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def leads_machine(self) -> bool:
        """The one process of its machine that looks at what all processes of the machine share."""
        return self.local_rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of ranks; to be called by all.

        Args:
            value: of plain lists, dicts, strings and numbers.

        Raises:
            ConfigError: another process has gone.
        """
        if self._store is None:
            return [value]
        self._exchanges += 1
        self._store.set(f"{self._exchanges}/{self.rank}", json.dumps(value))
        keys = [f"{self._exchanges}/{rank}" for rank in range(self.world)]
        try:
            self._store.wait(keys, self._timeout)
            return [json.loads(self._store.get(key)) for key in keys]
        except RuntimeError as error:
            raise ConfigError(
                f"rank {self.rank} has waited {self._timeout.total_seconds():.0f} s for the others",
                where=f"{self.world} processes of this launch",
                fix="look for an error in the log of the other ranks",
            ) from error

    def from_main(self, value: Any) -> Any:
        """The value of rank 0; to be called by all."""
        return self.gather(value)[0]


def join_launch(timeout_s: float) -> Launch:
    """Meet the other processes of this launch, if there are any.

    Args:
        timeout_s: longest wait for the others later on: the longest that a check of theirs may take.

    Raises:
        ConfigError: the others did not come.
    """
    from blip2train import distributed

    rank, world, local_rank = distributed.launched_as()
    if world == 1:
        return Launch()
    import torch.distributed as dist

    address, port = _meeting_place()
    # torchrun's agent has a store open at this port; under srun rank 0 opens one
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    meet = timedelta(seconds=SECONDS_TO_MEET)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, world, is_master=opens, timeout=meet, wait_for_workers=False
        )
        launch = Launch(
            *(rank, world, local_rank),
            address=address,
            store=dist.PrefixStore("blip2train_doctor", store),  # type: ignore[attr-defined]
            timeout_s=SECONDS_TO_MEET,
        )
        launch.gather(rank)
    except (RuntimeError, ConfigError) as error:
        raise ConfigError(
            f"rank {rank} did not meet the other {world - 1} of this launch within {SECONDS_TO_MEET:.0f} s",
            where=f"MASTER_ADDR={address}, MASTER_PORT={port}",
            fix="start one process per device on every machine, with torchrun or srun, and open the port between them",
        ) from error
    launch._timeout = timedelta(seconds=timeout_s)
    return launch


def _meeting_place() -> tuple[str, int]:
    """As torchrun states it, else as Lightning works it out under SLURM."""
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    from pytorch_lightning.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]

    try:
        slurm = SLURMEnvironment()
    except RuntimeError as error:
        raise ConfigError(
            str(error).splitlines()[0], where="srun", fix="sbatch --nodes=N --ntasks-per-node=DEVICES, then srun"
        ) from error
    return slurm.main_address, slurm.main_port


def free_port() -> int:
    """A port of this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the children of one check meet.

    Args:
        address, port: of the child of rank 0.
        folder: for what they write; the same path on every machine.
    """

    address: str
    port: int
    folder: str

    def child_environment(self) -> dict[str, str]:
        """The environment of a child that takes this process's place in the launch."""
        # torchrun's own store has the keys of the processes it started; the children open one of their own
        place = {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        return {**os.environ, **place}
