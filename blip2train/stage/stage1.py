"""Stage 1, representation learning: batch -> context -> ITC, ITM, ITG -> one weighted sum (paper, section 3.2).

The module knows its losses only as a mapping of names to objectives; LAVIS writes all three inside one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from blip2train import distributed
from blip2train.batch import Stage1Batch
from blip2train.errors import ConfigError
from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.objective.context import ContextSettings, Objective, Stage1Context
from blip2train.objective.draw import Draw
from blip2train.stage.common import (
    StepOutput,
    WeightLoader,
    build_seeded,
    prefixed,
    prepare_weights,
    seed_batch,
    strip_weights,
)
from blip2train.stage.probe import empty_stage1_batch


class Stage1Module(pl.LightningModule):
    """Trains a `Blip2Stage1` under any mapping of objectives.

    Args:
        build_model: makes the model; called inside Lightning's `configure_model`.
        objectives: log name (`itc`, `itm`, `itg`) -> objective; one with weight 0 is not computed.
        build_optim: model -> (optimizer, scheduler), one scheduler step per optimizer step.
        gather_gradients: let gradients flow through features gathered from other ranks, so that N ranks give the
            gradient of one rank with the whole batch; False detaches them as LAVIS does.
        global_means: every pair and every token of the global batch weighs the same; False: each rank takes its own
            mean, as in LAVIS.
        micro_batch_size: pairs that the Q-Former takes at a time; loss and gradient stay those of the whole batch.
            Costs one more forward pass and saves the activations of the other pairs. None: all at once.
        seed: of the initial weights, dropout and hard negatives.
        load_weights: fills the fresh model (resume); None keeps the initial weights.
    """

    strict_loading = False  # Lightning's file carries no weights, see strip_weights

    def __init__(
        self,
        *,
        build_model: Callable[[], Blip2Stage1],
        objectives: Mapping[str, Objective],
        build_optim: Callable[..., tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]],
        gather_gradients: bool = True,
        global_means: bool = True,
        micro_batch_size: int | None = None,
        seed: int = 0,
        load_weights: WeightLoader | None = None,
    ) -> None:
        super().__init__()
        self.objectives = {name: objective for name, objective in objectives.items() if objective.weight}
        if not self.objectives:
            raise ConfigError(
                "stage 1 has no objective left", where="stage.objectives", fix="keep one of itc, itm, itg"
            )
        if micro_batch_size is not None and (type(micro_batch_size) is not int or micro_batch_size < 1):
            raise ConfigError(
                f"micro_batch_size is {micro_batch_size!r}",
                where="stage.micro_batch_size",
                fix="give 1 or more pairs, or null for the whole batch at once",
            )
        self._build_model, self._build_optim, self._load_weights = build_model, build_optim, load_weights
        self.settings, self.seed = ContextSettings(gather_gradients, global_means, micro_batch_size), seed
        self.model: Blip2Stage1 | None = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = build_seeded(self._build_model, self.seed, self._load_weights)  # type: ignore[assignment]
            prepare_weights(self, self.model, self._probe)  # type: ignore[arg-type]

    def _probe(self) -> Tensor:
        """All losses of a tiny batch."""
        assert self.model is not None
        batch = empty_stage1_batch(self.model.vision_encoder, pairs=2, tokens=2)
        context = Stage1Context(self.model, batch, self.settings, Draw(self.seed, 0))
        return torch.stack([objective(context).loss for objective in self.objectives.values()]).sum()

    def training_step(self, batch: Stage1Batch, batch_idx: int) -> StepOutput:
        assert self.model is not None
        index = self.trainer.fit_loop.total_batch_idx
        seed_batch(self.seed, index, distributed.rank())
        context = Stage1Context(self.model, batch, self.settings, Draw(self.seed, index))
        metrics: dict[str, Tensor] = {}
        losses = []
        for name, objective in self.objectives.items():
            output = objective(context)
            losses.append(objective.weight * output.loss)
            metrics |= {f"train/{name}_loss": output.loss.detach()} | prefixed(name, output.metrics)
        loss = torch.stack(losses).sum()
        return StepOutput(loss=loss, metrics={"train/loss": loss.detach()} | metrics, samples=len(batch))

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self._build_optim(self.model)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        strip_weights(checkpoint)
