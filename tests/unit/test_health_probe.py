"""The probe names the module that made the first bad number, not the ones that it then went through."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blip2train.health.probe import is_finite, tensors_in, watch


@dataclass
class States:
    hidden: Tensor
    more: dict[str, Tensor]


class Break(nn.Module):
    """Divides by zero; hides the result in what real modules return."""

    def forward(self, x: Tensor) -> States:
        return States(torch.ones(1), {"logits": x / 0.0})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner, self.after = (
            nn.Linear(2, 2),
            nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
            nn.Linear(2, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)))


class Functional(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x).sub(1e9).sqrt()))


def first(net: nn.Module) -> dict | None:
    with watch(net) as probe, torch.no_grad():
        net(torch.ones(3, 2))
    return probe.first


def test_a_healthy_pass_has_no_first() -> None:
    assert first(Net()) is None


def test_the_innermost_module_with_a_finite_input_is_named() -> None:
    net = Net()
    net.inner[1] = Break()
    net.after = nn.Identity()
    found = first(net)
    assert found is not None
    assert (found["module"], found["class"], found["input_finite"]) == ("inner.1", "Break", True)
    assert found["weights_not_finite"] == []


def test_a_weight_that_is_not_finite_is_named() -> None:
    net = Net()
    with torch.no_grad():
        net.inner[0].weight[1, 0] = torch.nan
    found = first(net)
    assert found is not None
    assert (found["module"], found["weights_not_finite"]) == ("inner.0", ["weight"])
    assert (found["nan"], found["infinite"], found["output_shape"]) == (3, 0, [3, 2])


def test_code_between_modules_shows_as_an_input_that_is_not_finite() -> None:
    found = first(Functional())
    assert found is not None
    assert (found["module"], found["input_finite"]) == ("inner.0", False)


def test_the_hooks_are_gone_afterwards() -> None:
    net = Net()
    first(net)
    assert not any(module._forward_hooks for module in net.modules())


def test_tensors_are_found_in_whatever_modules_return() -> None:
    one, two, three = (torch.tensor(float(number)) for number in range(3))
    assert list(tensors_in([one, (States(two, {"a": three}), None, "text")])) == [one, two, three]


def test_integers_are_finite() -> None:
    assert is_finite(torch.tensor([1, 2])) and not is_finite(torch.tensor([1.0, torch.inf]))
    assert is_finite(torch.ones(2).to(torch.float8_e4m3fn))
