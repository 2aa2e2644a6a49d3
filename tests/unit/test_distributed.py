"""Each function is the identity on one process and the obvious thing on two."""

from pathlib import Path
from typing import Any

import pytest
import torch
from two_ranks import on_two_ranks

from blip2train import distributed


def test_one_process_is_rank_zero_of_one() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.is_main()
    assert not distributed.is_distributed()
    distributed.barrier()


def test_one_process_gathers_to_itself_detached_unless_asked() -> None:
    local = torch.ones(2, 3, requires_grad=True)
    assert distributed.gather(local, with_grad=True) is local
    detached = distributed.gather(local)
    assert torch.equal(detached, local)
    assert not detached.requires_grad
    assert distributed.gather_numbers(5, 7, device=local.device) == [(5, 7)]
    fetched, position = distributed.exchange_rows(local, torch.tensor([1, 1]), [2])
    assert fetched.shape == (0, 3) and position.tolist() == [1, 1]
    assert distributed.gather_objects(["a"]) == ["a"]
    total = distributed.reduce_sum(local)
    assert torch.equal(total, local)
    assert not total.requires_grad


def _everything(rank: int) -> dict[str, Any]:
    local = (torch.arange(6.0).reshape(2, 3) + 10 * rank).requires_grad_()
    gathered = distributed.gather(local, with_grad=True)
    weights = torch.arange(12.0).reshape(4, 3) * (rank + 1)
    (gathered * weights).sum().backward()
    detached = distributed.gather(local)
    distributed.barrier()
    return {
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "is_main": distributed.is_main(),
        "gathered": gathered.detach(),
        "gradient": local.grad,
        "detached": detached,
        "detached_requires_grad": detached.requires_grad,
        "numbers": distributed.gather_numbers(rank, 7, device=local.device),
        "objects": distributed.gather_objects([f"{rank}{index}" for index in range(1 + rank)]),
        "sum": distributed.reduce_sum(local),
        "local": local.detach(),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return on_two_ranks(_everything, folder)


def test_two_processes_know_their_place(ranks: list[dict[str, Any]]) -> None:
    assert [(item["rank"], item["world_size"], item["is_main"]) for item in ranks] == [(0, 2, True), (1, 2, False)]


def test_gathering_concatenates_in_rank_order(ranks: list[dict[str, Any]]) -> None:
    expected = torch.cat([torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3) + 10])
    for item in ranks:
        assert torch.equal(item["gathered"], expected)
        assert torch.equal(item["detached"], expected)
        assert not item["detached_requires_grad"]


def test_gradients_of_every_ranks_loss_sum_up_in_the_owner(ranks: list[dict[str, Any]]) -> None:
    weights = torch.arange(12.0).reshape(4, 3) * (1 + 2)
    assert torch.equal(torch.cat([item["gradient"] for item in ranks]), weights)


def test_numbers_come_in_rank_order(ranks: list[dict[str, Any]]) -> None:
    assert [item["numbers"] for item in ranks] == [[(0, 7), (1, 7)]] * 2


def test_objects_and_sums_cover_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for item in ranks:
        assert item["objects"] == ["00", "10", "11"]
        assert torch.equal(item["sum"], ranks[0]["local"] + ranks[1]["local"])


SIZES = [4, 2]
WANTED = [[[4, 4, 0, 5], [4, 3]], [[1, 0, 3, 2], [4, 5]], [[5, 0, 0, 0], [5, 4]]]
"""Rows for each rank: from both, from itself alone, from one side alone."""


def _rows(rank: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    whole = torch.arange(6 * 6).reshape(6, 2, 3).to(dtype)
    return whole[sum(SIZES[:rank]) :][: SIZES[rank]].requires_grad_(dtype.is_floating_point)


def _uneven(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {"exchanged": []}
    local = _rows(rank)
    weights = torch.arange(36.0, dtype=torch.float64).reshape(6, 2, 3) * (rank + 1)
    (distributed.gather(local, sizes=SIZES, with_grad=True, label="even") * weights).sum().backward()
    found["gather gradient"] = local.grad
    for dtype in (torch.float64, torch.bfloat16, torch.bool, torch.uint8):
        found[str(dtype)] = distributed.gather(_rows(rank, dtype), sizes=SIZES, label="gathered")
    found["gathered bytes"] = distributed.traffic()["gathered"]
    for case, wanted in enumerate(WANTED):
        local, label = _rows(rank), f"case {case}"
        fetched, position = distributed.exchange_rows(local, torch.tensor(wanted[rank]), SIZES, label=label)
        (torch.cat([local, fetched])[position] * (rank + 1)).sum().backward()
        frozen, _ = distributed.exchange_rows(local.detach(), torch.tensor(wanted[rank]), SIZES, label=f"frozen {case}")
        found["exchanged"].append(
            {
                "rows": torch.cat([local, fetched])[position].detach(),
                "fetched": fetched.detach(),
                "gradient": local.grad,
                "frozen needs grad": frozen.requires_grad,
                "bytes": {
                    name: size for name, size in distributed.traffic().items() if name.endswith((label, str(case)))
                },
                "bytes back": distributed.traffic().get(f"{label} (backward)"),
                "frozen back": distributed.traffic().get(f"frozen {case} (backward)"),
            }
        )
    return found


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("uneven")
    return on_two_ranks(_uneven, folder)


def _whole(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.arange(6 * 6).reshape(6, 2, 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.uint8])
def test_ranks_with_different_numbers_of_rows_gather_any_format(
    uneven: list[dict[str, Any]], dtype: torch.dtype
) -> None:
    for item in uneven:
        assert item[str(dtype)].dtype == dtype and torch.equal(item[str(dtype)], _whole(dtype))


def test_gradients_of_uneven_rows_sum_up_in_the_owner(uneven: list[dict[str, Any]]) -> None:
    weights = torch.arange(36.0, dtype=torch.float64).reshape(6, 2, 3) * (1 + 2)
    assert torch.equal(torch.cat([item["gather gradient"] for item in uneven]), weights)


@pytest.mark.parametrize("case", range(len(WANTED)))
def test_wanted_rows_arrive_once_each_and_own_rows_do_not_travel(uneven: list[dict[str, Any]], case: int) -> None:
    for rank, item in enumerate(uneven):
        found, wanted = item["exchanged"][case], WANTED[case][rank]
        assert torch.equal(found["rows"], _whole()[wanted])
        first, end = sum(SIZES[:rank]), sum(SIZES[: rank + 1])
        remote = sorted({row for row in wanted if not first <= row < end})
        assert torch.equal(found["fetched"], _whole()[remote])
        assert found["bytes"][f"case {case}"] == len(remote) * 6 * 8


@pytest.mark.parametrize("case", range(len(WANTED)))
def test_gradients_of_fetched_rows_sum_up_in_the_owner(uneven: list[dict[str, Any]], case: int) -> None:
    expected = torch.zeros(6, 2, 3, dtype=torch.float64)
    for rank, rows in enumerate(WANTED[case]):
        for row in rows:
            expected[row] += rank + 1
    assert torch.equal(torch.cat([item["exchanged"][case]["gradient"] for item in uneven]), expected)


def test_nothing_is_sent_back_where_nothing_needs_a_gradient(uneven: list[dict[str, Any]]) -> None:
    for case in range(len(WANTED)):
        sent = sum(item["exchanged"][case]["bytes"][f"case {case}"] for item in uneven)
        assert sum(item["exchanged"][case]["bytes back"] for item in uneven) == sent
        for item in uneven:
            assert not item["exchanged"][case]["frozen needs grad"] and item["exchanged"][case]["frozen back"] is None


def test_uneven_rows_are_padded_to_the_longest_rank_on_their_way(uneven: list[dict[str, Any]]) -> None:
    assert [item["gathered bytes"] for item in uneven] == [max(SIZES) * 6 * (8 + 2 + 1 + 1)] * 2


def test_a_pretended_world_sends_nothing_and_counts_as_many_as_it_says() -> None:
    local = torch.ones(2, 3, requires_grad=True)
    with distributed.pretend_world(3):
        assert (distributed.world_size(), distributed.rank(), distributed.is_distributed()) == (3, 0, False)
        assert distributed.gather(local, with_grad=True).shape == (6, 3)
        assert distributed.gather_numbers(2, device=local.device) == [(2,)] * 3
        assert distributed.reduce_sum(torch.tensor(4)).item() == 12
        fetched, position = distributed.exchange_rows(local, torch.tensor([0, 5]), [2, 2, 2])
        assert fetched.shape == (2, 3) and fetched.requires_grad and position.tolist() == [2, 3]
