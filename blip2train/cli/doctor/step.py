"""Check "step": a few steps of the real config through the real `train`, in processes of their own, and its checkpoint.

The same module, strategy, data and precision as in the run, in a folder beside the run's that is removed afterwards.
Loggers are left out: an attempt is not to appear among the runs of a project.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from blip2train.cli.doctor.child import Outcome, last_words, run_children
from blip2train.cli.doctor.context import OWN_KEYS, Context, StepMeasure
from blip2train.cli.doctor.row import Row
from blip2train.run_dir import RunDir, read_json

CHECK = "step"
NOT_OF_TRAIN = (*OWN_KEYS, "run_dir", "resume", "logger")
"""Keys that the doctor takes for itself, or sets for the steps it tries."""


def check_step(context: Context) -> Iterator[Row]:
    """One row of the steps, and one of the checkpoint."""
    assert context.meeting is not None
    folder = Path(context.meeting.folder)
    measure, run = folder / "measure.json", folder / "run"
    arguments = training_arguments(context.arguments, run, measure, context.steps, context.resume)
    command = ["blip2train.cli.train", *arguments]
    launched = context.launch.world > 1
    outcome = run_children(
        command,
        [context.meeting.child_environment() if launched else os.environ],
        folder / f"step-{context.launch.rank}.log",
        context.seconds - 10,
        context.say,
        alarm=folder / "step-failed",
    )
    if not outcome.good:
        if not outcome.stopped_by_others:
            yield failed_step(outcome)
        return
    if not context.launch.is_main:
        return
    context.facts.step = StepMeasure.from_json(read_json(measure))
    yield judge_step(context.facts.step, outcome.seconds)
    context.say("reading the checkpoint")
    yield judge_checkpoint(RunDir(run))


def training_arguments(
    arguments: Sequence[str], run: Path, measure: Path, steps: int, resume: Path | None = None
) -> list[str]:
    """Arguments of a training as the one that was asked about, in another folder and stopped after some steps.

    Args:
        arguments: of the doctor: overrides and options.
        run: the run folder.
        measure: where the probe writes.
        steps: optimizer steps.
        resume: the checkpoint that the run would go on from.
    """
    kept = [item for item in arguments if _key(item) not in NOT_OF_TRAIN]
    probe = {"_target_": "blip2train.callback.step_probe.StepProbe", "steps": str(steps), "out": quoted(str(measure))}
    return [
        *kept,
        f"run_dir={quoted(str(run))}",
        f"resume={'never' if resume is None else quoted(str(resume))}",
        "logger=[]",
        *(f"+callback.doctor.{key}={value}" for key, value in probe.items()),
    ]


def _key(override: str) -> str:
    """The first part of the key that an override is about: `logger` of `+logger.wandb.project=x`."""
    if override.startswith("-"):
        return ""
    return override.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]


def quoted(text: str) -> str:
    """A string as Hydra's overrides take it, whatever is in it."""
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"


def failed_step(outcome: Outcome) -> Row:
    """What the training said when it failed."""
    found, advice = last_words(outcome)
    return Row(CHECK, "fail", found, advice)


def judge_step(step: StepMeasure, seconds: float) -> Row:
    """Rates of the steps; whether they are good is for the checks that compare them with something."""
    each = ", ".join(f"{value:.2f}" for value in step.step_seconds)
    measured = (
        f"{len(step.step_seconds)} steps on {step.world_size} device(s): {each} s; "
        f"{step.samples_per_step / step.seconds:,.1f} samples/s after the first; {seconds:.0f} s with start and end"
    )
    return Row(CHECK, "ok", measured)


def judge_checkpoint(run: RunDir) -> Row:
    """The checkpoint that the steps left: whole, by its checksums, and with the files of a resumable one."""
    from blip2train.checkpoint.find import find_checkpoint

    checkpoint = find_checkpoint(run, files=None)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    return Row(
        CHECK, "ok", f"its checkpoint of {size / 1e6:,.1f} MB was written, and read back with the right checksums"
    )
