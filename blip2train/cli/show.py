"""`blip2train show WHAT`: the newcomer's microscope, from one batch to a run's memory. Overrides as for `train`."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from blip2train.cli import check
from blip2train.cli.config import build, quiet_libraries, register_resolvers, require_filled, run_subverb
from blip2train.cli.evaluate import load_run_config
from blip2train.cli.features import with_features
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

USAGE = """usage: blip2train show batch|order|masks|params|estimate|config|paper-diff  [overrides as for train]

  batch       one batch of the data pipeline: every field with its shape, captions, and the images as show_batch.png;
              batch=RUN/bad_steps/step-N/batch-rankR.pt: the batch of a step that went wrong
  order       which records a run draws, sample by sample, undecoded (steps=1..3, samples=0..99, run=FOLDER)
  masks       the three self-attention masks of stage 1 (paper, figure 2), as a picture show_masks.png and as text
  params      trainable and frozen parameters, module by module (depth=3), from the config alone
  estimate    memory per device and time of a training (device_gb=40 samples_per_second=810), from the config alone
  config      the composed config, every interpolation resolved
  paper-diff  how the config differs from the paper and from LAVIS, value by value"""


def main() -> None:
    verbs = {
        "batch": ("show_batch", show_batch),
        "order": ("show_order", _show_order),
        "masks": ("train", show_masks),
        "params": ("show_params", _show_params),
        "estimate": ("show_estimate", _show_estimate),
        "config": ("train", show_config),
        "paper-diff": ("train", _show_paper_diff),
    }
    run_subverb(USAGE, verbs, extra=["hydra.run.dir=.", "hydra.job_logging.root.handlers=[console]"])


def show_config(config: DictConfig) -> None:
    register_resolvers()
    sys.stdout.write(OmegaConf.to_yaml(config, resolve=True))


def _check(config: DictConfig) -> DictConfig:
    """As before a training, but no stage-1 weights are asked for: nothing here would read them.

    Returns:
        The config to build: of cached features, where it names some.
    """
    if config.get("out", None) and Path(config.out).is_dir():
        raise ConfigError(f"{config.out} is a folder", where="out", fix="name a file, out=FILE.json")
    config.init_from = "scratch"
    require_filled(config)
    check.check_train(config)
    quiet_libraries()
    return with_features(config)


def _show_order(config: DictConfig) -> None:
    logging.getLogger("blip2train").setLevel(logging.WARNING)  # the log goes where the table goes
    if config.run is not None:
        of_run = load_run_config(RunDir.open(config.run))
        of_run.steps, of_run.samples = config.steps, config.samples
        config = of_run
    _check(config)
    from blip2train.cli.show_order import show_order

    show_order(config)


def _show_params(config: DictConfig) -> None:
    config = _check(config)
    from blip2train.cli.show_params import show_params

    show_params(config)


def _show_estimate(config: DictConfig) -> None:
    config = _check(config)
    from blip2train.cli.show_estimate import show_estimate

    show_estimate(config)


def _show_paper_diff(config: DictConfig) -> None:
    from blip2train.cli.paper_diff import show_paper_diff

    show_paper_diff(config)


def show_batch(config: DictConfig) -> None:
    """One batch as training would see it first, or a saved one."""
    if config.get("batch", None) is not None:
        _show_saved_batch(Path(config.batch))
        return
    config = _check(config)
    import torch

    torch.manual_seed(config.seed)
    config.data.num_workers, config.data.drop_log = 0, None
    datamodule = build(config.data)
    _show(next(iter(datamodule.train_dataloader())), build(config.data.collator.tokenizer))


def _show_saved_batch(path: Path) -> None:
    """A batch that a training saved in its run folder, whose config says how to read the text."""
    from blip2train.batch_file import load_batch

    batch, facts = load_batch(path)
    folder = path.absolute().parent
    run = load_run_config(RunDir.open(folder.parent.parent, where="batch="))
    log.info("step %(step)s, rank %(rank)s, micro-batch %(batch_index)s of the run", facts)
    _show(batch, build(run.data.collator.tokenizer))
    log.info("what was found out about it: %s", folder / "report.json")


def _show(batch: Any, tokenizer: Any) -> None:
    import torch

    console = Console()
    table = Table("field", "shape", "dtype", "range", title=f"{type(batch).__name__} (legend: blip2train/batch.py)")
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            span = f"{value.min().item():g} .. {value.max().item():g}" if value.numel() else "empty"
            table.add_row(field.name, str(tuple(value.shape)), str(value.dtype).removeprefix("torch."), span)
        elif value is not None:
            table.add_row(field.name, f"({len(value)},)", type(value[0]).__name__, f"{value[0]} .. {value[-1]}")
    console.print(table)
    texts = _texts(batch, tokenizer)
    for key, text in list(zip(batch.keys, texts, strict=True))[:8]:
        console.print(f"  {key}: {text}", markup=False, highlight=False)
    if batch.pixel_values is None:
        console.print("images: none, the batch holds image tokens of features=")
    else:
        console.print(f"images: {_draw_batch(batch.pixel_values, texts)}")


def _texts(batch: Any, tokenizer: Any) -> list[str]:
    from blip2train.batch import Stage1Batch

    if isinstance(batch, Stage1Batch):
        decoded: list[str] = tokenizer.decode(batch.input_ids)
        return decoded
    prompts = tokenizer.decode(batch.prompt_ids) if batch.prompt_ids.shape[1] else [""] * len(batch)
    targets = tokenizer.decode(batch.target_ids)
    return [
        f"[{prompt}] -> {target}" if prompt else f"-> {target}" for prompt, target in zip(prompts, targets, strict=True)
    ]


def _draw_batch(pixels_B3HW: Tensor, texts: list[str]) -> Path:
    from matplotlib.figure import Figure

    columns, shown = 4, min(len(texts), 12)
    rows = -(-shown // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    for index in range(shown):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(pixels_B3HW[index].permute(1, 2, 0).numpy())
        axes.set_title(texts[index], fontsize=7, wrap=True)
        axes.set_axis_off()
    out = Path("show_batch.png")
    figure.savefig(out, dpi=110)
    return out.resolve()


def show_masks(config: DictConfig) -> None:
    """The masks of a small example: 4 queries, 5 text tokens of which the last is padding."""
    import torch
    from matplotlib.figure import Figure

    from blip2train.model.qformer import mask

    num_queries, text_mask = 4, torch.tensor([[True, True, True, True, False]])
    masks = (
        ("ITC: unimodal", "[CLS]", mask.unimodal(num_queries, text_mask)[0]),
        ("ITG: multimodal causal", "[DEC]", mask.multimodal_causal(num_queries, text_mask)[0]),
        ("ITM: bidirectional", "[CLS]", mask.bidirectional(num_queries, text_mask)[0]),
    )
    console = Console()
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    for place, (title, first, allowed_SS) in enumerate(masks):
        names = [*(f"q{index}" for index in range(num_queries)), first, "a", "red", "dog", "pad"]
        console.print(f"\n{title}   (row attends to column where marked)")
        console.print("        " + " ".join(f"{name:>5}" for name in names), markup=False, highlight=False)
        for name, row in zip(names, allowed_SS.tolist(), strict=True):
            marks = " ".join(f"{'■' if allowed else '·':>5}" for allowed in row)
            console.print(f"{name:>7} {marks}", markup=False, highlight=False)
        _draw_mask(figure.add_subplot(1, 3, place + 1), title, allowed_SS, names, num_queries)
    figure.suptitle("Who sees whom in the Q-Former's shared self-attention (BLIP-2, figure 2); coloured = may attend")
    out = Path("show_masks.png")
    figure.savefig(out, dpi=110)
    console.print(f"\npicture: {out.resolve()}")


def _draw_mask(axes: Any, title: str, allowed_SS: Tensor, names: list[str], num_queries: int) -> None:
    axes.imshow(allowed_SS.numpy(), cmap="Blues", vmin=0, vmax=1.4)
    axes.set_xticks(range(len(names)), names, rotation=60)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title)
    axes.set_xlabel("attended to")
    axes.set_ylabel("attending")
    axes.axhline(num_queries - 0.5, color="black", linewidth=1)
    axes.axvline(num_queries - 0.5, color="black", linewidth=1)


if __name__ == "__main__":
    main()
