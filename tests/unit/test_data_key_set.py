"""Which keys are new."""

import random

from blip2train.data.key_set import KeySet


def test_it_agrees_with_a_set_of_strings() -> None:
    rng = random.Random(0)
    keys = [f"k{rng.randrange(3000)}" for _ in range(5000)] + ["é", "\ud800", ""]
    known: set[str] = set()
    expected = [not (key in known or known.add(key)) for key in keys]  # type: ignore[func-returns-value]
    found: list[bool] = []
    seen = KeySet()
    start = 0
    while start < len(keys):
        size = rng.randrange(1, 200)
        found += seen.add(keys[start : start + size])
        start += size
    assert found == expected


def test_nothing_is_new_twice_and_nothing_is_nothing() -> None:
    seen = KeySet()
    assert seen.add([]) == []
    assert seen.add(["a", "b", "a"]) == [True, True, False]
    assert seen.add(["b", "c"]) == [False, True]


def test_it_takes_eight_bytes_per_key_in_few_runs() -> None:
    seen = KeySet()
    for start in range(0, 100_000, 1000):
        seen.add([str(number) for number in range(start, start + 1000)])
    assert sum(run.nbytes for run in seen._runs) == 800_000 and len(seen._runs) < 12
