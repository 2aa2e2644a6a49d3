"""How ranks and workers share streams and batches: plain integers, so that a config is checked before torch is loaded.

Implements the rule that lets a run go on in another shape: ranks x workers divide the logical streams. LAVIS has no
such rule, since its order depends on ranks and workers anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

from blip2train.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shape:
    """Who reads: may change when a run is resumed.

    Args:
        rank: of this process.
        world_size: ranks W.
        num_workers: readers K per rank, at least 1: reading in the training process counts as one.
        batch_size: samples B per batch and rank.
    """

    rank: int
    world_size: int
    num_workers: int
    batch_size: int


def check_readers(num_streams: int, world_size: int, num_workers: int) -> None:
    """Each logical stream needs exactly one reader.

    Args:
        num_streams: logical streams.
        world_size: ranks.
        num_workers: loader processes per rank; 0 reads in the training process.

    Raises:
        ConfigError: ranks x workers do not divide the streams; names what does.
    """
    readers = world_size * max(1, num_workers)
    if num_streams % readers == 0:
        return
    divisors = [number for number in range(1, num_streams + 1) if num_streams % number == 0]
    fitting = [str(number // world_size) for number in divisors if number % world_size == 0]
    advice = f"data.num_workers={' or '.join(fitting)}" if fitting else "another number of devices"
    raise ConfigError(
        f"{num_streams} streams cannot be shared evenly by {world_size} ranks x {max(1, num_workers)} workers = "
        f"{readers} readers; the divisors of {num_streams} are {', '.join(map(str, divisors))}",
        where="data.num_streams, data.num_workers, trainer.devices, trainer.num_nodes",
        fix=f"use {advice}; a new run may also take data.num_streams={readers * -(-num_streams // readers)}",
    )


def batch_per_device(batch_size: int | None, global_batch_size: int | None, world_size: int) -> int:
    """Samples per batch and rank, from the one of the two sizes that is given.

    Raises:
        ConfigError: not exactly one is given, it is below 1, or the global one is no multiple of the number of ranks.
    """
    given = [size for size in (batch_size, global_batch_size) if size is not None]
    if len(given) != 1 or given[0] < 1:
        raise ConfigError(
            f"batch_size={batch_size}, global_batch_size={global_batch_size}",
            where="data.batch_size, data.global_batch_size",
            fix="give one of the two, 1 or more, and null for the other",
        )
    if global_batch_size is None:
        return given[0]
    if global_batch_size % world_size:
        raise ConfigError(
            f"a global batch of {global_batch_size} cannot be shared evenly by {world_size} ranks",
            where="data.global_batch_size",
            fix="give a multiple of the number of ranks",
        )
    return global_batch_size // world_size
