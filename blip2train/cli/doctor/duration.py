"""Check "time": from a few measured steps, how long the run will take, and whether data or checkpoints hold it up."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from omegaconf import DictConfig

from blip2train.cli.doctor.context import Context, StepMeasure, devices_per_node
from blip2train.cli.doctor.devices import num_gpus
from blip2train.cli.doctor.row import Row

CHECK = "time"
WAITING_AT_MOST = 0.1
"""Share of a step that is spent waiting for data."""
SPARE_SPEED = 1.2
"""What the loader should be able to do over what the devices take: a step that waits cannot be made up for."""
SAVING_AT_MOST = 0.05
"""Share of the run that is spent on checkpoints."""


def check_time(context: Context) -> Iterator[Row]:
    """The whole run; the loader; the checkpoints."""
    facts, config = context.facts, context.config
    if facts.step is None:
        yield Row(CHECK, "skip", "no step was measured", "correct what failed above")
        return
    ends = os.environ.get("SLURM_JOB_END_TIME", "")
    left = float(ends) - time.time() if ends.isdecimal() else None
    yield judge_duration(facts.step, int(config.trainer.max_steps) - facts.first_step, left)
    rate = None
    if facts.loader_samples_per_s is not None:
        readers = devices_per_node(config, num_gpus()) * int(config.trainer.get("num_nodes", 1))
        rate = facts.loader_samples_per_s * readers * max(1, int(config.data.num_workers))
    yield judge_data(facts.step, rate, int(config.data.num_workers))
    saving = saving_interval(config, facts.step.seconds)
    if saving and facts.checkpoint_bytes and facts.write_bytes_per_s:
        yield judge_saving(facts.checkpoint_bytes / facts.write_bytes_per_s, saving)


def judge_duration(step: StepMeasure, num_steps: int, left: float | None) -> Row:
    """Seconds per step times steps: an estimate, and called one.

    Args:
        step: measured.
        num_steps: that the run has before it.
        left: seconds until the scheduler ends this job, if it says so.
    """
    whole = step.seconds * num_steps
    measured = (
        f"{step.seconds:.3g} s per step: {num_steps:,} steps take about {in_words(whole)} "
        f"(estimated from {max(1, len(step.step_seconds) - 1)} steps)"
    )
    if left is not None and whole > left:
        fix = "let the job be requeued (scancel --signal, --requeue): resume=auto continues it"
        return Row(CHECK, "warn", f"{measured}; this job ends in {in_words(left)}", fix)
    return Row(CHECK, "ok", measured)


def judge_data(step: StepMeasure, rate: float | None, workers: int) -> Row:
    """Whether the loader keeps up.

    Args:
        step: measured.
        rate: samples per second of all loader processes, as one of them alone was measured; None if it was not.
        workers: loader processes per device.
    """
    need = step.samples_per_step / step.seconds
    measured = f"{100 * step.waiting:.0f} % of the steps spent waiting for data"
    slow = step.waiting > WAITING_AT_MOST
    if rate is not None:
        measured += f"; the loaders can read {rate:,.0f} samples/s, the steps take {need:,.0f}"
        slow = slow or rate < SPARE_SPEED * need
    if not slow:
        return Row(CHECK, "ok", measured)
    wanted = max(workers + 1, 1 if rate is None else round(max(1, workers) * SPARE_SPEED * need / rate + 0.5))
    return Row(
        CHECK,
        "warn",
        measured,
        f"data.num_workers={wanted} if there are cores for them, or smaller images in the shards",
    )


def saving_interval(config: DictConfig, step_seconds: float) -> float | None:
    """Seconds between two checkpoints, the shorter of steps and minutes; None if there is only one at the end."""
    steps, minutes = config.checkpoint.get("every_steps"), config.checkpoint.get("every_minutes")
    intervals = [int(steps) * step_seconds] if steps else []
    intervals += [60.0 * float(minutes)] if minutes else []
    return min(intervals, default=None)


def judge_saving(seconds: float, interval: float) -> Row:
    """The time that checkpoints take, by the speed of the disk, of the time between them."""
    share = seconds / (seconds + interval)
    measured = f"a checkpoint every {in_words(interval)}, written in {seconds:.1f} s: {100 * share:.1f} % of the run"
    if share > SAVING_AT_MOST:
        return Row(CHECK, "warn", measured, "a larger checkpoint.every_steps, or a faster disk for run_dir=")
    return Row(CHECK, "ok", measured)


def in_words(seconds: float) -> str:
    """`93784` -> "1 d 2 h", `7325` -> "2 h 2 min", `75` -> "1 min 15 s", `2.5` -> "2.5 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next(place for place, (number, _) in enumerate(parts) if number)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2] if number)
