"""Ranks and workers share streams and batches evenly, or the config is refused with numbers that would do."""

import pytest

from blip2train.data.sharing import batch_per_device, check_readers
from blip2train.errors import ConfigError


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 64), (16, 4), (2, 2), (64, 1)])
def test_divisors_of_the_streams_are_fine(ranks: int, workers: int) -> None:
    check_readers(64, ranks, workers)


@pytest.mark.parametrize(
    ("ranks", "workers", "advice"),
    [
        (1, 3, "data.num_workers=1 or 2 or 4 or 8 or 16 or 32 or 64; a new run may also take data.num_streams=66"),
        (16, 8, "data.num_workers=1 or 2 or 4; a new run may also take data.num_streams=128"),
        (6, 2, "another number of devices; a new run may also take data.num_streams=72"),
    ],
)
def test_other_numbers_are_refused_with_those_that_fit(ranks: int, workers: int, advice: str) -> None:
    with pytest.raises(ConfigError, match="the divisors of 64 are 1, 2, 4, 8, 16, 32, 64") as caught:
        check_readers(64, ranks, workers)
    assert caught.value.fix == f"use {advice}"


def test_one_of_the_two_batch_sizes_decides() -> None:
    assert batch_per_device(7, None, 16) == 7
    assert batch_per_device(None, 1680, 16) == 105
    for sizes, said in (((None, None), "=None"), ((4, 8), "batch_size=4"), ((0, None), "=0"), ((None, -2), "=-2")):
        with pytest.raises(ConfigError, match=said):
            batch_per_device(*sizes, 2)
    with pytest.raises(ConfigError, match="1681 cannot be shared evenly by 16 ranks"):
        batch_per_device(None, 1681, 16)
