"""Which device a process takes: its own GPU where there are some, and no device that is not there."""

import pytest
import torch

from blip2train.cli.processes import choose_device
from blip2train.errors import ConfigError


def test_every_process_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device("auto", rank) for rank in range(3)] == [torch.device("cuda", rank) for rank in (0, 1, 0)]
    assert choose_device("cpu", 1) == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_not_there_is_refused_before_any_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=name):
        choose_device(name, 0)
