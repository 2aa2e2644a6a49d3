"""Every yaml that ships is a test case, found by globbing: it composes, and names arguments that exist."""

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from blip2train.cli.config import compose, config_dir, resolved_yaml
from blip2train.cli.evaluate import merge_with_run

CONFIGS = config_dir()
EXPERIMENTS = sorted(
    path.relative_to(CONFIGS / "experiment").with_suffix("").as_posix()
    for path in CONFIGS.glob("experiment/**/*.yaml")
    if not path.name.startswith("_")  # a part that presets share, nothing to run
)
BENCHMARKS = sorted(path.stem for path in CONFIGS.glob("benchmark/*.yaml"))
THIRD_PARTY_GROUPS = {"trainer", "logger", "callback"}


def locate(target: str) -> Any:
    parts = target.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[cut:], found)
    raise ModuleNotFoundError(target)


def targets(node: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield where, node
        for key, value in node.items():
            yield from targets(value, f"{where}.{key}" if where else key)


def check_arguments(config: Any) -> None:
    for where, node in targets(config):
        try:
            parameters = inspect.signature(locate(node["_target_"])).parameters
        except ValueError:  # a type written in C, such as timedelta, says nothing; calling it does
            locate(node["_target_"])(**{key: value for key, value in node.items() if not key.startswith("_")})
            continue
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            continue
        given = {key for key in node if not key.startswith("_")}
        assert given <= set(parameters), f"{where}: {node['_target_']} does not take {given - set(parameters)}"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_composes_resolves_and_names_real_arguments(experiment: str) -> None:
    config = compose("train", [f"experiment={experiment}", "run_dir=outputs/x"])
    plain = OmegaConf.to_container(config, resolve=True)
    check_arguments({key: value for key, value in plain.items() if key != "hydra"})
    assert config.name == experiment.replace("/", "_")


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_benchmark_composes_with_a_run_and_names_real_arguments(benchmark: str) -> None:
    trained = compose("train", ["experiment=microworld_stage2_opt", "run_dir=outputs/x"])
    chosen = compose("evaluate", [f"benchmark={benchmark}", "run=x"])
    merged = merge_with_run(chosen, OmegaConf.create(resolved_yaml(trained)))
    whole = OmegaConf.to_container(merged, resolve=True)
    assert list(whole["benchmarks"]) == [benchmark]
    assert whole["benchmarks"][benchmark]["name"] == benchmark
    check_arguments(whole["benchmarks"])


@pytest.mark.parametrize("group", ["trainer", "logger", "callback", "optim", "objective"])
def test_every_option_of_a_group_names_real_arguments(group: str) -> None:
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        if path.stem.startswith("deepspeed"):
            continue  # Lightning imports deepspeed for seconds; its own slow test covers it
        raw = OmegaConf.load(path)
        check_arguments(OmegaConf.to_container(raw, resolve=False))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_group_is_the_subpackage_its_target_lies_in(path: Path) -> None:
    group = path.relative_to(CONFIGS).parts[0]
    text = path.read_text(encoding="utf-8")
    top = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    own = top.get("_target_") if isinstance(top, dict) else None
    if own and group not in THIRD_PARTY_GROUPS:
        assert own.startswith(f"blip2train.{group}."), f"{path}: {own}"
    if group == "experiment":
        assert "_target_" not in text and text.startswith("# @package _global_\n# ")
    elif group != "launcher":  # it chooses among Hydra's own
        assert "@package _global_" not in text
    assert not re.search(r"/(home|root|Users)/", text), "a path of one machine"
