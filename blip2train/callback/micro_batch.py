"""Where a run stands in gradient accumulation: the one place that asks Lightning's private loop for it."""

import pytorch_lightning as pl


def between_micro_batches(trainer: pl.Trainer) -> bool:
    """Whether an optimizer step is under way, whose gradients so far no checkpoint could hold."""
    return trainer.fit_loop.epoch_loop._should_accumulate()
