"""The numbers are a function of what they stand for, evenly spread, and know nothing of each other."""

import math

import torch

from blip2train.objective.draw import Draw, pair_hash


def grid(draw: Draw, rows: int, columns: int, stream: int = 0) -> torch.Tensor:
    return draw.uniform(stream, torch.arange(rows)[:, None], torch.arange(columns)[None, :])


def splitmix64(state: int) -> int:
    """The published finaliser on Python's integers."""
    mask = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_numbers_are_the_published_hash_of_row_and_column() -> None:
    def mixed_key(*numbers: int) -> int:
        key = 0
        for number in numbers:
            key = splitmix64((key + 0x9E3779B97F4A7C15 * (number + 1)) % 2**64)
        return key

    for seed, step, stream, row, column in [
        (0, 0, 0, 0, 0),
        (42, 7, 3, 1679, 5),
        (2**31, 10**6, 1, 2**63 - 1, -(2**63)),
    ]:
        of_row = splitmix64((mixed_key(seed, step, stream) + row) % 2**64)
        expected = ((splitmix64((of_row + column) % 2**64) >> 12) + 0.5) / 2**52
        assert float(Draw(seed, step).uniform(stream, torch.tensor(row), torch.tensor(column))) == expected


def test_a_part_of_the_batch_has_the_numbers_of_the_whole() -> None:
    whole = grid(Draw(3, 9), 8, 8)
    part = Draw(3, 9).uniform(0, torch.arange(4, 6)[:, None], torch.arange(8)[None, :])
    assert torch.equal(part, whole[4:6])


def test_seed_step_stream_row_and_column_each_change_everything() -> None:
    first = grid(Draw(0, 0), 50, 50)
    others = [grid(Draw(1, 0), 50, 50), grid(Draw(0, 1), 50, 50), grid(Draw(0, 0), 50, 50, stream=1), first.T]
    for other in others:
        off_diagonal = ~torch.eye(50, dtype=torch.bool)
        assert not (first == other)[off_diagonal].any()
        both = torch.stack([first[off_diagonal], other[off_diagonal]])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 4 / math.sqrt(both.shape[1])


def test_numbers_are_evenly_spread() -> None:
    draws = torch.cat([grid(Draw(0, step), 200, 200).flatten() for step in range(5)])
    counts = torch.histc(draws.float(), bins=64, min=0, max=1).double()
    expected = len(draws) / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 113  # 63 degrees of freedom: once in 10,000
    neighbours = torch.stack([draws[:-1], draws[1:]])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 4 / math.sqrt(len(draws))


def test_no_number_is_zero_or_one_and_its_noise_is_finite() -> None:
    noise = Draw(0, 0).gumbel(0, torch.arange(300)[:, None], torch.arange(300)[None, :])
    assert torch.isfinite(noise).all()
    assert abs(float(noise.mean()) - 0.5772) < 4 * 1.2825 / 300
    smallest, largest = 0.5 * 2.0**-52, (2.0**52 - 0.5) * 2.0**-52
    assert smallest > 0 and largest < 1  # of the only 2**52 values
    assert math.isfinite(-math.log(-math.log(smallest))) and math.isfinite(-math.log(-math.log(largest)))


def test_a_pair_is_its_image_and_its_words_in_order_whatever_the_padding() -> None:
    ids = torch.tensor([[2, 5, 6, 0], [2, 6, 5, 0], [2, 5, 6, 0], [2, 5, 6, 0], [2, 5, 6, 9]])
    mask = torch.tensor([[True, True, True, False]] * 3 + [[True] * 4, [True, True, True, False]])
    images = torch.tensor([1, 1, 2, 1, 1])
    found = pair_hash(images, ids, mask)
    assert len(set(found[:4].tolist())) == 4
    assert found[4] == found[0], "what the mask hides does not count"
    wider = pair_hash(images, torch.nn.functional.pad(ids, (0, 3)), torch.nn.functional.pad(mask, (0, 3)))
    assert torch.equal(wider, found)
    order = torch.tensor([3, 1, 0, 4, 2])
    assert torch.equal(pair_hash(images[order], ids[order], mask[order]), found[order])
