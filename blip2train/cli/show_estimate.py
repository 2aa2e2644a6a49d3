"""`blip2train show estimate`: what a device needs for a training and how long it takes, from the config alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from blip2train.cli.check import device_batch, stage_number
from blip2train.cli.estimate import Estimate, estimate, read_sharing
from blip2train.errors import ConfigError
from blip2train.model.memory import GIB
from blip2train.run_dir import write_json

SECONDS_PER_HOUR = 3600
FILLED_AT_MOST = 0.9
"""Of a device; what the note below the table names takes the rest."""
LABELS = {
    "gradients": "gradients",
    "batch": "batch",
    "vision encoder": "vision encoder",
    "image tokens": "image tokens",
    "query pass": "query pass",
    "text pass": "text pass (ITC)",
    "itc": "ITC",
    "itm": "ITM, 3 pairs per pair",
    "itg": "ITG, with logits over the vocabulary",
    "language model": "language model, with logits",
    "lm": "LM loss",
    "backward": "made by the backward pass",
}
NOTE = (
    "Measured on one step of this config, run on tensors without memory under the rules of a GPU's kernels and "
    "autocast, with every text at full length. Not included: the CUDA context, NCCL's buffers and the allocator's "
    "slack; leave a tenth of the device free for them."
)


def show_estimate(config: DictConfig) -> None:
    """Print the estimate of a composed and checked config; `out` takes it as JSON."""
    seconds = steps_and_time(config)
    result = estimate(config, text_tokens=config.get("text_tokens", None))
    console = Console()
    console.print(_table(config, result))
    console.print(NOTE, style="dim", highlight=False)
    console.print(f"peak {result.peak / GIB:.1f} GiB per device", highlight=False)
    limit = config.get("device_gb", None)
    if limit is not None:
        _judge(console, config, result.peak / GIB, limit)
    for name, value in seconds.items():
        console.print(f"{name}: {value:,.0f}" if value >= 1000 else f"{name}: {value:.3g}", highlight=False)
    if config.get("out", None):
        write_json(Path(config.out), as_json(config, result) | {"time": seconds})


def _judge(console: Console, config: DictConfig, peak: float, limit: float) -> None:
    """Whether a peak fits into a device, both in GiB, with what the estimate leaves out."""
    if peak <= FILLED_AT_MOST * limit:
        console.print(f"fits into {limit} GiB, {limit - peak:.1f} of them free", highlight=False)
        return
    found = f"{peak:.1f} GiB do not fit into {limit} GiB"
    if peak <= limit:
        found = f"{peak:.1f} of {limit} GiB leave less than a tenth free"
    console.print(f"warning: {found}. Try {_less_memory(config)}", style="yellow", highlight=False)


def _less_memory(config: DictConfig) -> str:
    ways = ["a smaller data.batch_size with more trainer.accumulate_grad_batches"]
    if stage_number(config) == 1:
        smaller = (config.stage.micro_batch_size or device_batch(config)) // 2
        ways[0] += " (ITC then sees fewer negatives)"
        ways[:0] = [f"stage.micro_batch_size={smaller} (loss and gradient stay the same)"] if smaller else []
    if not config.model.qformer.get("checkpoint_activations", False):
        ways.append("model.qformer.checkpoint_activations=true")
    sharing = read_sharing(config)
    if sharing.zero_stage is None and not sharing.fsdp2 and sharing.devices > 1:
        ways.append("trainer=fsdp2 or deepspeed_zero2")
    ways.append("text_tokens= if your captions are shorter")
    return "; ".join(ways)


def _table(config: DictConfig, result: Estimate) -> Table:
    shared = result.sharing
    strategy = ", FSDP2" if shared.fsdp2 else "" if shared.zero_stage is None else f", ZeRO-{shared.zero_stage}"
    how = f"{shared.devices} device(s){strategy}"
    title = f"{config.name}: GiB per device, {result.batch_size} pairs each, {how}, {config.trainer.get('precision')}"
    table = Table("what", "loss known", "peak", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, size in result.fixed.items():
        if size:
            table.add_row(name, f"{size / GIB:.3f}", f"{size / GIB:.3f}")
    table.add_section()
    order = [*LABELS, *sorted({*result.step.kept, *result.step.peak} - set(LABELS))]
    for label in order:
        kept, peak = result.step.kept.get(label, 0), result.step.peak.get(label, 0)
        if kept or peak:
            table.add_row(LABELS.get(label, label), f"{kept / GIB:.3f}", f"{peak / GIB:.3f}")
    table.add_section()
    where = "backward" if result.step.peak_in_backward else "forward"
    table.add_row(f"all (peak in the {where} pass)", f"{result.kept / GIB:.3f}", f"{result.peak / GIB:.3f}")
    return table


def steps_and_time(config: DictConfig) -> dict[str, float]:
    """Steps per second, hours, samples and epochs of a run, as far as the config gives what they need.

    Raises:
        ConfigError: a rate or a size that is not above 0.
    """
    for key in ("samples_per_second", "epoch_samples", "device_gb", "text_tokens"):
        value, kinds = config.get(key, None), (int,) if key == "text_tokens" else (int, float)
        if value is not None and (type(value) not in kinds or value <= 0):
            number = "whole number" if key == "text_tokens" else "number"
            raise ConfigError(f"{key} is {value!r}", where=key, fix=f"give a {number} above 0, or leave it out")
    micro_batches = int(config.trainer.get("accumulate_grad_batches", 1))
    global_batch = read_sharing(config).devices * device_batch(config) * micro_batches
    facts: dict[str, float] = {
        "global batch": global_batch,
        "optimizer steps": config.trainer.max_steps,
        "samples seen": config.trainer.max_steps * global_batch,
    }
    rate, epoch = config.get("samples_per_second", None), config.get("epoch_samples", None)
    if rate is not None:
        facts["steps per second"] = rate / global_batch
        facts["hours"] = facts["samples seen"] / rate / SECONDS_PER_HOUR
    if epoch is not None:
        facts["epochs"] = facts["samples seen"] / epoch
    return facts


def as_json(config: DictConfig, result: Estimate) -> dict[str, object]:
    """The estimate in bytes, as plain values."""
    return {
        "name": config.name,
        "unit": "bytes per device",
        "batch_size": result.batch_size,
        "sharing": asdict(result.sharing),
        "fixed": result.fixed,
        "loss_known": dict(result.step.kept),
        "peak": dict(result.step.peak),
        "peak_pass": "backward" if result.step.peak_in_backward else "forward",
        "total": {"loss_known": result.kept, "peak": result.peak},
    }
