import pytest
import torch
from torch import nn

from blip2train.errors import ConfigError
from blip2train.optim.param_group import group_parameters, summarize


class Toy(nn.Module):
    """One of each kind of parameter that a BLIP-2 stage trains."""

    def __init__(self) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, 4, 6))
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.words = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6)
        self.dense = nn.Linear(6, 6)
        self.patches = nn.Conv2d(3, 6, 2)
        self.attention = nn.MultiheadAttention(6, 2)
        self.tied_head = nn.Linear(6, 9)
        self.tied_head.weight = self.words.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)


def _names(no_decay: str) -> dict[str, set[str]]:
    groups = group_parameters(Toy(), 0.05, no_decay)  # type: ignore[arg-type]
    return {group.name: {name for name, _ in group.parameters} for group in groups}


MATRICES = {"dense.weight", "patches.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
VECTORS = {
    "norm.weight",
    "norm.bias",
    "dense.bias",
    "patches.bias",
    "attention.in_proj_bias",
    "attention.out_proj.bias",
    "tied_head.bias",
}
SPECIAL = {"query_tokens", "temperature", "words.weight"}


def test_paper_decays_the_weight_matrices_of_layers_alone() -> None:
    assert _names("paper") == {"decay": MATRICES, "no_decay": VECTORS | SPECIAL}


def test_lavis_exempts_one_dimensional_parameters_and_biases_alone() -> None:
    assert _names("lavis") == {"decay": MATRICES | SPECIAL, "no_decay": VECTORS}


@pytest.mark.parametrize("no_decay", ["paper", "lavis"])
def test_every_trainable_parameter_is_in_exactly_one_group(no_decay: str) -> None:
    model = Toy()
    groups = group_parameters(model, 0.05, no_decay)  # type: ignore[arg-type]
    grouped = [id(item) for group in groups for _, item in group.parameters]
    assert sorted(grouped) == sorted(id(item) for item in model.parameters() if item.requires_grad)
    assert [group.weight_decay for group in groups] == [0.05, 0.0]


def test_a_head_tied_to_the_embedding_does_not_decay_whichever_comes_first() -> None:
    model = nn.Module()
    model.head = nn.Linear(4, 9, bias=False)
    model.words = nn.Embedding(9, 4)
    model.words.weight = model.head.weight
    assert [group.name for group in group_parameters(model, 0.05)] == ["no_decay"]


def test_summary_shows_name_size_and_decay_of_each_group() -> None:
    lines = summarize(group_parameters(Toy(), 0.05)).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("decay")
    assert "0.05" in lines[0]
    assert "252 parameters" in lines[0]  # 36 dense + 72 patches + 108 + 36 attention
    assert "dense.weight" in lines[0]


def test_nothing_to_train_and_unknown_rules_are_errors() -> None:
    with pytest.raises(ConfigError, match="no parameter requires a gradient"):
        group_parameters(nn.Linear(2, 2).requires_grad_(False), 0.05)
    with pytest.raises(ConfigError, match="lavis"):
        group_parameters(Toy(), 0.05, "timm")  # type: ignore[arg-type]
