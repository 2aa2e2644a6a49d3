"""Which keys images get, and which images came before."""

import hashlib
import random

import pytest

from blip2train.data import key_set
from blip2train.data.key_set import KeySet


def suffixed(key: str, name: str, attempt: int = 0) -> str:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4, salt=attempt.to_bytes(8, "little"))
    return f"{key}-{digest.hexdigest()}"


def test_it_agrees_with_a_table_of_strings() -> None:
    rng = random.Random(0)
    names = [f"{rng.randrange(2000)}.{rng.choice(['jpg', 'jpg', 'jpg', 'png'])}" for _ in range(5000)]
    names += ["é.jpg", "\ud800.jpg", ".jpg", ".png", "\ud800.png"]
    keys = [name.split(".")[0] for name in names]
    owners: dict[str, str] = {}
    expected: list[str | None] = []
    for key, name in zip(keys, names, strict=True):
        own = key if owners.setdefault(key, name) == name else suffixed(key, name)
        expected.append(None if own in expected else own)
        owners[own] = name
    assert expected.count(None) > 1000 and sum("-" in (key or "") for key in expected) > 300
    found: list[str | None] = []
    seen = KeySet()
    start = 0
    while start < len(keys):
        size = rng.randrange(1, 200)
        found += seen.claim(keys[start : start + size], names[start : start + size])
        start += size
    assert found == expected


def test_nothing_is_new_twice_and_nothing_is_nothing() -> None:
    seen = KeySet()
    assert seen.claim([], []) == []
    assert seen.claim(["a", "b", "a"], ["a", "b", "a"]) == ["a", "b", None]
    assert seen.claim(["b", "c"], ["b", "c"]) == [None, "c"]


def test_an_image_called_like_anothers_suffixed_key_loses_nothing() -> None:
    taken = suffixed("a", "a.png")
    seen = KeySet()
    keys, names = ["a", taken, "a"], ["a.jpg", f"{taken}.jpg", "a.png"]
    assert seen.claim(keys, names) == ["a", taken, suffixed("a", "a.png", 1)]
    assert seen.claim(keys, names) == [None] * 3


def test_keys_whose_hashes_meet_are_told_apart_by_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 10 bits of the key hundreds of 1,000 meet; none may be lost."""
    monkeypatch.setattr(key_set, "_NAME_BITS", 54)
    keys = [f"k{number}" for number in range(400)]
    seen = KeySet()
    claimed = seen.claim(keys[:150], keys[:150]) + seen.claim(keys[150:], keys[150:])
    assert len(set(claimed)) == len(keys) and None not in claimed
    assert any(key != own for key, own in zip(keys, claimed, strict=True))


def test_it_takes_eight_bytes_per_key_in_few_runs() -> None:
    seen = KeySet()
    for start in range(0, 100_000, 1000):
        keys = [str(number) for number in range(start, start + 1000)]
        assert seen.claim(keys, [f"{key}.jpg" for key in keys]) == keys
    assert sum(run.nbytes for run in seen._runs) == 800_000 and len(seen._runs) < 12
