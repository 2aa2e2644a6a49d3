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
    assert torch.equal(distributed.gather_padded(local, dim=1, value=0), local)
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
    ragged_ids = torch.full((2, 3 + rank), rank + 1)
    ragged_mask = torch.ones(2, 4 - rank, dtype=torch.bool)
    distributed.barrier()
    return {
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "is_main": distributed.is_main(),
        "gathered": gathered.detach(),
        "gradient": local.grad,
        "detached": detached,
        "detached_requires_grad": detached.requires_grad,
        "ids": distributed.gather_padded(ragged_ids, dim=1, value=9),
        "mask": distributed.gather_padded(ragged_mask, dim=1, value=False),
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


def test_ragged_texts_are_padded_to_the_longest_over_ranks(ranks: list[dict[str, Any]]) -> None:
    for item in ranks:
        assert item["ids"].tolist() == [[1, 1, 1, 9]] * 2 + [[2, 2, 2, 2]] * 2
        assert item["mask"].tolist() == [[True] * 4] * 2 + [[True, True, True, False]] * 2


def test_objects_and_sums_cover_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for item in ranks:
        assert item["objects"] == ["00", "10", "11"]
        assert torch.equal(item["sum"], ranks[0]["local"] + ranks[1]["local"])
