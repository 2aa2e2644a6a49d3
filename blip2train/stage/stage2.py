"""Stage 2, generative learning: batch -> visual prompt -> frozen language model -> LM loss (paper, section 3.3).

Decoder-only and encoder-decoder models go through the same step; the language-model adapter aligns logits and targets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from blip2train import distributed
from blip2train.batch import Stage2Batch
from blip2train.data.collate import Stage2Collator
from blip2train.data.datamodule import BlipDataModule
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.language_model.base import check_vocabulary
from blip2train.objective.language_modeling import LanguageModelingObjective
from blip2train.stage.common import (
    StepOutput,
    WeightLoader,
    build_seeded,
    prefixed,
    prepare_weights,
    seed_batch,
    strip_weights,
)
from blip2train.stage.probe import empty_stage2_batch


class Stage2Module(pl.LightningModule):
    """Trains the Q-Former and the projection of a `Blip2Stage2` against its frozen language model.

    Args:
        build_model: makes the model; called inside Lightning's `configure_model`.
        objective: loss over aligned logits and targets.
        build_optim: model -> (optimizer, scheduler), one scheduler step per optimizer step.
        global_means: every target token of the global batch weighs the same; False: each rank takes its own mean, as in
            LAVIS.
        seed: of the initial weights and dropout.
        load_weights: fills the fresh model (stage-1 weights, or a resumed checkpoint); None keeps the initial ones.
    """

    strict_loading = False  # Lightning's file carries no weights, see strip_weights

    def __init__(
        self,
        *,
        build_model: Callable[[], Blip2Stage2],
        objective: LanguageModelingObjective,
        build_optim: Callable[..., tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]],
        global_means: bool = True,
        seed: int = 0,
        load_weights: WeightLoader | None = None,
    ) -> None:
        super().__init__()
        self._build_model, self._build_optim, self._load_weights = build_model, build_optim, load_weights
        self.objective, self.global_means, self.seed = objective, global_means, seed
        self.model: Blip2Stage2 | None = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = build_seeded(self._build_model, self.seed, self._load_weights)  # type: ignore[assignment]
            prepare_weights(self, self.model, self._probe)  # type: ignore[arg-type]

    def _probe(self) -> Tensor:
        """The loss of a tiny batch."""
        assert self.model is not None
        return self.objective(self.model(empty_stage2_batch(self.model.vision_encoder, 2, 1, 2))).loss

    def on_fit_start(self) -> None:
        datamodule: object = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(datamodule, BlipDataModule) and isinstance(datamodule.collator, Stage2Collator):
            assert self.model is not None
            check_vocabulary(self.model.language_model, datamodule.collator.tokenizer.vocab_size)

    def training_step(self, batch: Stage2Batch, batch_idx: int) -> StepOutput:
        assert self.model is not None
        seed_batch(self.seed, self.trainer.fit_loop.total_batch_idx, distributed.rank())
        # forward by name, without the model's hooks: ZeRO-3 holds weights that are used outside their own module for as
        # long as the innermost module whose output it understands, and that must be this step
        output = self.objective(self.model.forward(batch), global_means=self.global_means)
        metrics = {"train/loss": output.loss.detach(), "train/lm_loss": output.loss.detach()}
        return StepOutput(loss=output.loss, metrics=metrics | prefixed("lm", output.metrics), samples=len(batch))

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self._build_optim(self.model)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        strip_weights(checkpoint)
