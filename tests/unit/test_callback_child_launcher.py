"""What the main process of Lightning's launcher does when one of its children ends."""

import subprocess
import sys

import pytest

from blip2train.callback.child_launcher import leaving_code, watch_children


def child(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", f"import os, time; {code}"])


@pytest.mark.parametrize(
    ("ended", "code"),
    [([75], 75), ([-9], 75), ([2], 2), ([75, 2], 2), ([1], 1), ([-9, 1], 1), ([130, 130], 130), ([3, 75], 3)],
)
def test_an_error_of_its_own_wins_over_a_wish_to_go_on(ended: list[int], code: int) -> None:
    assert leaving_code(ended) == code


def test_a_failed_child_takes_the_others_along() -> None:
    children = [child("os._exit(2)"), child("time.sleep(60)")]
    left: list[int] = []
    watch_children(children, left.append, patience=0)
    assert left == [2] and children[1].wait(5) == -9


def test_children_that_end_well_end_the_watch() -> None:
    left: list[int] = []
    watch_children([child("pass"), child("time.sleep(0.2)")], left.append, patience=0)
    assert left == []
