"""`blip2train show params`: trainable and frozen parameters, module by module, without reading a weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from blip2train.errors import ConfigError
from blip2train.run_dir import write_json

if TYPE_CHECKING:
    from torch import nn

BERT_BASE_WIDTH = 768
NOTE = (
    "The paper counts differently from table to table: 188M (section 3.1, table 1) is stage 1 with queries and text "
    "branch; 103M to 108M (table 2) is stage 2, which drops the text branch and adds a projection to the language "
    "model; 1.1B (table 3) is stage 2 with ViT-g trained at 364 pixels; 1.2B (tables 4 and 5) is ViT-g with the text "
    "branch kept."
)


def show_params(config: DictConfig) -> None:
    """Print the table of a composed and checked config; `out` takes it as JSON."""
    from blip2train.cli.meta import build_meta
    from blip2train.model.freezing import count_parameters

    depth = config.get("depth", 1)
    if not isinstance(depth, int) or depth < 1:
        raise ConfigError(f"depth is {depth!r}", where="depth", fix="give 1 or more levels of modules")
    model = build_meta(config)
    rows = count_by_module(model, depth)
    table = Table("module", "trainable", "frozen", "dtype", title=f"{config.name}: {config.model._target_}")
    for column in table.columns[1:3]:
        column.justify = "right"
    for name, (trainable, frozen, dtypes) in rows.items():
        table.add_row(name, f"{trainable:,}", f"{frozen:,}", ", ".join(sorted(dtypes)))
    table.add_section()
    total = count_parameters(model)
    table.add_row("all", *(f"{count:,}" for count in total), "")
    console = Console()
    console.print(table)
    if config.model.qformer.get("hidden_size") == BERT_BASE_WIDTH:
        console.print(NOTE, style="dim", highlight=False)
    if config.get("out", None):
        modules = {
            name: {"trainable": trainable, "frozen": frozen, "dtypes": sorted(dtypes)}
            for name, (trainable, frozen, dtypes) in rows.items()
        }
        write_json(
            Path(config.out), {"name": config.name, "trainable": total[0], "frozen": total[1], "modules": modules}
        )


def count_by_module(model: nn.Module, depth: int) -> dict[str, tuple[int, int, set[str]]]:
    """Trainable and frozen parameters and their dtypes, by module path cut after `depth` names.

    A parameter that hangs on the model itself keeps its own name; a shared one counts where it is met first.
    """
    rows: dict[str, tuple[int, int, set[str]]] = {}
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0] or name
        key = ".".join(path.split(".")[:depth])
        trainable, frozen, dtypes = rows.get(key, (0, 0, set()))
        if parameter.requires_grad:
            trainable += parameter.numel()
        else:
            frozen += parameter.numel()
        rows[key] = (trainable, frozen, dtypes | {str(parameter.dtype).removeprefix("torch.")})
    return rows
