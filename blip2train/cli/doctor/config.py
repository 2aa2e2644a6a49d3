"""Check "config": what `train` refuses before it starts, and the config that it then would build."""

from __future__ import annotations

from collections.abc import Iterator

from blip2train.cli import check
from blip2train.cli.doctor.context import Context
from blip2train.cli.doctor.row import Row

CHECK = "config"


def check_config(context: Context) -> Iterator[Row]:
    """One row; keeps the config to build for the checks that follow."""
    from blip2train.cli.features import with_features
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
