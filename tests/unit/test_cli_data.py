"""`blip2train data` finds its verbs."""

import importlib

import pytest

from blip2train.cli import data
from blip2train.cli.config import config_dir


@pytest.mark.parametrize("verb", data.VERBS)
def test_every_verb_has_its_config_and_its_function(verb: str) -> None:
    name = f"data_{verb.replace('-', '_')}"
    assert (config_dir() / f"{name}.yaml").is_file()
    assert callable(importlib.import_module(f"blip2train.cli.{name}").run)


def test_the_usage_names_every_verb() -> None:
    assert all(f"\n  {verb} " in data.usage() for verb in data.VERBS)
