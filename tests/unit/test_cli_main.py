"""The dispatcher's order of arguments, against the parser of Hydra that will read them."""

import pytest
from hydra._internal.utils import get_args_parser

from blip2train.cli.config import options_first


@pytest.mark.parametrize(
    ("arguments", "overrides", "config_dir"),
    [
        (["seed=1", "--config-dir", "mine", "~logger"], ["seed=1", "~logger"], "mine"),
        (["seed=1", "--config-dir=mine"], ["seed=1"], "mine"),
        (["params", "seed=1", "--config-dir=mine", "model=b"], ["params", "seed=1", "model=b"], "mine"),
        (["seed=1,2", "-m", "optim.lr=1e-4"], ["seed=1,2", "optim.lr=1e-4"], None),
        (["seed=1", "--cfg", "job"], ["seed=1"], None),
    ],
)
def test_options_may_stand_anywhere(arguments: list[str], overrides: list[str], config_dir: str | None) -> None:
    """An override that `show` puts at the end comes after them, as here."""
    subverb = [word for word in arguments[:1] if "=" not in word]
    ordered = options_first(arguments)
    assert ordered[: len(subverb)] == subverb
    parsed = get_args_parser().parse_args([*ordered[len(subverb) :], "hydra.run.dir=."])
    assert parsed.overrides == [*overrides[len(subverb) :], "hydra.run.dir=."]
    assert parsed.config_dir == config_dir
