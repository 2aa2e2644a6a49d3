"""`blip2train show paper-diff`: a composed config beside what the paper and LAVIS publish (`published.yaml`).

Covers sections 3.1 to 3.4 and 4.1 of the paper. LAVIS's own yamls differ from the paper and do not say so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from blip2train.cli import check
from blip2train.cli.config import register_resolvers
from blip2train.errors import ConfigError

PUBLISHED = Path(__file__).with_name("published.yaml")

Column = Literal["paper", "lavis"]
COLUMNS: Mapping[Column, str] = {"paper": "the paper", "lavis": "LAVIS"}

_ENCODERS = {"eva_giant_patch14_clip_224": "vitg", "vit_large_patch14_clip_quickgelu_224": "vitl"}
_WIDTH_WITHOUT_TERMINAL = 160


@dataclass(frozen=True, slots=True)
class Published:
    """A published value; `one_of`: any of the list `value` would do."""

    value: Any
    one_of: bool = False

    def equals(self, found: Any) -> bool:
        return any(_same(item, found) for item in self.value) if self.one_of else _same(self.value, found)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One setting of a config; `paper` and `lavis` are None where nothing is published."""

    setting: str
    key: str
    found: Any
    paper: Published | None
    lavis: Published | None
    source: str

    def published(self, column: Column) -> Published | None:
        return self.paper if column == "paper" else self.lavis

    def differs(self, column: Column) -> bool:
        """Whether something is published there and the config has another value."""
        published = self.published(column)
        return published is not None and not published.equals(self.found)


def show_paper_diff(config: DictConfig) -> None:
    """Print the table and, below it, which settings differ from which."""
    rows = compare(config)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_WITHOUT_TERMINAL)
    table = Table("setting", "this config", "paper", "LAVIS", "source", title=f"{config.name}: ≠ marks what differs")
    for row in rows:
        table.add_row(row.setting, Text(_text(row.found)), *(_cell(row, column) for column in COLUMNS), row.source)
    console.print(table)
    for column, name in COLUMNS.items():
        stated = sum(row.published(column) is not None for row in rows)
        apart = [row.setting for row in rows if row.differs(column)]
        names = f": {', '.join(apart)}" if apart else ""
        console.print(f"differs from {name} in {len(apart)} of {stated} settings{names}", highlight=False, markup=False)


def compare(config: DictConfig) -> list[Comparison]:
    """Every published setting of the config's stage, in the order of `published.yaml`.

    Raises:
        ConfigError: the config has no stage.
    """
    register_resolvers()
    if not config.get("stage"):
        raise ConfigError("no stage chosen", where="stage=", fix="choose an experiment=, or stage= and the rest")
    stage = check.stage_number(config)
    facts = {"encoder": _encoder(config), "language_model": _language_model(config)}
    rows: Any = OmegaConf.to_container(OmegaConf.load(PUBLISHED))
    return [
        Comparison(
            setting=row["setting"],
            key=row["key"],
            found=_found(config, row["key"]),
            paper=_published(row, "paper", facts),
            lavis=_published(row, "lavis", facts),
            source=row["source"],
        )
        for row in rows
        if row.get("stage", stage) == stage
    ]


def _published(row: Mapping[str, Any], column: Column, facts: Mapping[str, str | None]) -> Published | None:
    if column not in row:
        return None
    value = row[column]
    if "by" in row:
        fact = facts[row["by"]]
        if fact not in value:
            return None
        value = value[fact]
    return Published(value, one_of=row.get("one_of", False))


def _found(config: DictConfig, key: str) -> Any:
    """The config's value; None where it has none, also where it waits for another that is not set."""
    try:
        if key in _COMPUTED:
            return _COMPUTED[key](config)
        value = OmegaConf.select(config, key, throw_on_missing=False)
    except (OmegaConfBaseException, ZeroDivisionError):
        return None
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _global_batch(config: DictConfig) -> int | None:
    if OmegaConf.is_missing(config.trainer, "devices"):
        return None
    pairs = check.contrastive_batch(config)
    return None if pairs is None else pairs * int(config.trainer.get("accumulate_grad_batches", 1))


def _contrastive_batch(config: DictConfig) -> int | None:
    """Pairs of one forward pass on all devices; micro-batches add none."""
    return None if OmegaConf.is_missing(config.trainer, "devices") else check.contrastive_batch(config)


def _losses(config: DictConfig) -> list[str]:
    """Names of those that are neither removed, which leaves a node without class, nor weighted 0."""
    nodes = config.stage.objectives.items()
    return sorted(str(name) for name, node in nodes if "_target_" in node and node.weight)


def _encoder(config: DictConfig) -> str | None:
    return _ENCODERS.get(_vision_encoder(config))


def _vision_encoder(config: DictConfig) -> str:
    """timm's name without the tag of its weights, which may come from a file."""
    return str(config.model.vision_encoder.name).split(".")[0]


def _language_model(config: DictConfig) -> str | None:
    """transformers' name of the architecture; None in stage 1, or where the yaml does not state it."""
    name = OmegaConf.select(config, "llm.architecture.model_type")
    return None if name is None else str(name)


def _qformer_init(config: DictConfig) -> str | None:
    """Last part of a hub name or folder."""
    source = config.get("init_qformer")
    return None if source is None else PurePath(str(source)).name


def _starts_from(config: DictConfig) -> str:
    """Of stage 2: its own random weights, or a stage-1 run, whether it is named yet or not."""
    source = OmegaConf.select(config, "init_from", throw_on_missing=False)
    return "scratch" if source == "scratch" else "stage 1"


def _mixture(config: DictConfig) -> dict[str, float]:
    total = sum(float(item.weight) for item in config.data.datasets.values())
    return {str(name): round(float(item.weight) / total, 3) for name, item in config.data.datasets.items()}


def _of_all(config: DictConfig, field: str) -> Any:
    """A setting of the datasets' transforms: one value where all agree, else dataset -> value."""
    by_name = {
        str(name): OmegaConf.to_container(item.transform).get(field)  # type: ignore[union-attr]
        for name, item in config.data.datasets.items()
    }
    values = list(by_name.values())
    return values[0] if values and all(value == values[0] for value in values) else by_name


def _augment(config: DictConfig) -> dict[str, str] | None:
    """Dataset -> what it gets on top of crop and flip; None where no dataset gets anything."""
    chosen = {name: item.transform.get("augment") for name, item in config.data.datasets.items()}
    return {str(name): _describe(augment) for name, augment in chosen.items() if augment} or None


def _describe(augment: DictConfig) -> str:
    name = str(augment._target_).rpartition(".")[2]
    strength = f" {augment.num_ops} of magnitude {augment.magnitude}" if "num_ops" in augment else ""
    return f"{name}{strength}"


_COMPUTED: Mapping[str, Callable[[DictConfig], Any]] = {
    "<global_batch>": _global_batch,
    "<contrastive_batch>": _contrastive_batch,
    "<losses>": _losses,
    "<datasets>": lambda config: sorted(map(str, config.data.datasets)),
    "<mixture>": _mixture,
    "<crop_scale>": lambda config: _of_all(config, "scale"),
    "<horizontal_flip>": lambda config: _of_all(config, "horizontal_flip"),
    "<augment>": _augment,
    "<vision_encoder>": _vision_encoder,
    "<language_model>": _language_model,
    "<qformer_init>": _qformer_init,
    "<starts_from>": _starts_from,
}


def _same(published: Any, found: Any) -> bool:
    if isinstance(published, list) and isinstance(found, list):
        return len(published) == len(found) and all(map(_same, published, found))
    if isinstance(published, dict) and isinstance(found, dict):
        return published.keys() == found.keys() and all(_same(value, found[key]) for key, value in published.items())
    if isinstance(published, bool) or isinstance(found, bool):
        return published is found
    if isinstance(published, int | float) and isinstance(found, int | float):
        return math.isclose(published, found, rel_tol=1e-9)
    return bool(published == found)


def _cell(row: Comparison, column: Column) -> Text:
    published = row.published(column)
    if published is None:
        return Text("-")
    if not row.differs(column):
        return Text(_text(row.found))
    text = " or ".join(map(_text, published.value)) if published.one_of else _text(published.value)
    return Text(f"≠ {text}", style="bold yellow")


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    text = str(value)
    return json.dumps(text) if not text or text != text.strip() else text
