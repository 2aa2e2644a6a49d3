"""Check "config": what `train` refuses before it starts, what it then would build, and where it would go on from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from blip2train.cli import check
from blip2train.cli.doctor.context import Context
from blip2train.cli.doctor.row import Row
from blip2train.run_dir import RunDir

CHECK = "config"


def check_config(context: Context) -> Iterator[Row]:
    """One row of the config and one of the run folder; keeps what the checks that follow need of both."""
    from blip2train.cli.features import with_features
    from blip2train.cli.resume import find_resume_point
    from blip2train.cli.train import adopt_vision_encoder

    config = context.config
    check.check_train(config)
    adopt_vision_encoder(config)
    context.built = with_features(config)
    forward = check.contrastive_batch(config)
    micro = int(config.trainer.get("accumulate_grad_batches", 1))
    batch = (
        "a global batch that the number of devices decides" if forward is None else f"global batch {forward * micro}"
    )
    yield Row(
        CHECK,
        "ok",
        f"{config.name}: stage {check.stage_number(config)}, {batch}, {config.trainer.max_steps:,} steps, "
        f"precision {config.trainer.get('precision')}",
    )
    point = find_resume_point(config, RunDir(context.run_dir))
    if point is None:
        yield Row(CHECK, "ok", f"a new run in {context.run_dir}")
        return
    context.resume, context.facts.first_step = point.checkpoint, point.step
    yield judge_resume(point.checkpoint, point.step, int(config.trainer.max_steps))


def judge_resume(checkpoint: Path, step: int, max_steps: int) -> Row:
    """Where the run goes on from; a finished one has nothing to go on with."""
    if step >= max_steps:
        return Row(
            CHECK,
            "fail",
            f"the run is finished: {checkpoint}",
            "another run_dir= for a new run, with init_from= this one",
        )
    return Row(CHECK, "ok", f"goes on from {checkpoint}, whose checksums are right")
