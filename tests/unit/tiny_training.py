"""A training of milliseconds that can be made to go wrong at a step of choice."""

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from blip2train import distributed
from blip2train.batch import Stage2Batch
from blip2train.optim.schedule import warmup_cosine

ROWS = 4


class Batches(Dataset):
    """Batch n has the keys n-0 ... n-3 and the rank's own pixels; all its values are functions of n and the rank."""

    def __init__(self, count: int = 10_000) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Stage2Batch:
        draw = torch.Generator().manual_seed(100 * number + distributed.rank())
        pixels = torch.randint(0, 256, (ROWS, 3, 2, 2), dtype=torch.uint8, generator=draw)
        ids, mask = torch.ones(ROWS, 2, dtype=torch.int64), torch.ones(ROWS, 2, dtype=torch.bool)
        return Stage2Batch(pixels, ids, mask, ids, mask, [f"{number}-{row}" for row in range(ROWS)])


class Net(nn.Module):
    """Pixels -> one number per row, through two layers and dropout; a layer that stays frozen comes first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.hidden, self.head = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.dropout = nn.Dropout(0.1)
        self.frozen.requires_grad_(False)


class TinyModule(pl.LightningModule):
    """Fits the mean pixel.

    Args:
        disturb: called with the module and the batch index before each step.
        spoil: changes hidden states (rows, 8) of a batch index; tells NaN where it should come from.
    """

    def __init__(
        self,
        disturb: Callable[["TinyModule", int], None] = lambda module, index: None,
        spoil: Callable[[Tensor, int], Tensor] = lambda hidden, index: hidden,
        lr: float = 1e-2,
        clip_loss: Callable[[Tensor, int], Tensor] = lambda loss, index: loss,
        max_steps: int = 100,
    ) -> None:
        super().__init__()
        self.model, self.lr, self.max_steps, self.seed = Net(), lr, max_steps, 0
        self._disturb, self._spoil, self._change_loss = disturb, spoil, clip_loss

    def training_step(self, batch: Stage2Batch, batch_idx: int) -> dict[str, Any]:
        index = self.trainer.fit_loop.total_batch_idx
        torch.manual_seed(index)
        self._disturb(self, index)
        pixels = batch.images.flatten(1).float() / 255
        hidden = self._spoil(self.model.frozen(pixels), index)
        guess = self.model.head(self.model.dropout(torch.tanh(self.model.hidden(hidden))))
        loss = self._change_loss((guess[:, 0] - pixels.mean(dim=1)).square().mean(), index)
        return {"loss": loss, "metrics": {"train/loss": loss.detach()}, "samples": len(batch)}

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, warmup_steps=2, max_steps=self.max_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module: TinyModule, callbacks: Sequence[pl.Callback], max_steps: int, **changes: Any) -> pl.Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "max_epochs": -1,
    }
    ckpt_path = changes.pop("ckpt_path", None)
    trainer = pl.Trainer(max_steps=max_steps, callbacks=list(callbacks), **(settings | changes))
    trainer.fit(module, DataLoader(Batches(), batch_size=None), ckpt_path=ckpt_path, weights_only=True)
    return trainer
