"""Ranks agree through the store of the rendezvous, and know the errors of one that is gone."""

from pathlib import Path

import pytest
import torch.distributed as dist
from two_ranks import on_two_ranks

from blip2train.errors import DataError
from blip2train.peers import Agreement, LastWord, is_lost_peer


def test_alone_what_one_says_holds_at_once() -> None:
    agreement = Agreement("stop")
    assert [agreement.say(value) for value in (0, 2, 1)] == [0, 2, 1]


def says(rank: int) -> list[int]:
    agreement, other = Agreement("stop"), Agreement("other")
    words = [(0, 0), (0, 1), (0, 0), (2, 1), (1, 1), (0, 2), (0, 0), (0, 0)]
    heard = [agreement.say(word[rank]) for word in words]
    assert other.say(0) == 0  # another subject starts anew
    LastWord().wait(5)
    return heard


def test_both_ranks_hear_the_larger_word_one_call_later(tmp_path: Path) -> None:
    assert on_two_ranks(says, tmp_path) == [[0, 0, 1, 0, 2, 1, 2, 0]] * 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40210"
        ),
        RuntimeError("Application timeout caused pair closure"),
        dist.DistBackendError("NCCL error in: ..."),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
    ],
)
def test_a_lost_rank_is_known_by_what_the_backends_say(error: RuntimeError) -> None:
    outer = RuntimeError("the checkpoint could not be written")
    outer.__cause__ = error
    assert is_lost_peer(error) and is_lost_peer(outer)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError("connection refused"), ValueError()])
def test_other_errors_are_no_lost_rank(error: Exception) -> None:
    shard = DataError("no shard", where="urls", fix="check")
    shard.__cause__ = error
    assert not is_lost_peer(error) and not is_lost_peer(shard)
