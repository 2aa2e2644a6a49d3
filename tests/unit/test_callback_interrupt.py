"""A signal ends a run between optimizer steps, never inside one, and on all ranks after the same one."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from two_ranks import on_two_ranks

from blip2train.callback.interrupt import InterruptCallback


class Line(pl.LightningModule):
    """Counts its micro-batches; the one called `signal_at` sends this process a SIGTERM."""

    def __init__(self, signal_at: int) -> None:
        super().__init__()
        self.weight, self.signal_at, self.batches = torch.nn.Parameter(torch.ones(1)), signal_at, 0

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.batches += 1
        if self.batches == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_signal_between_micro_batches_waits_for_the_optimizer_step() -> None:
    interrupt, module = InterruptCallback(), Line(signal_at=5)
    trainer = pl.Trainer(
        max_steps=10,
        accumulate_grad_batches=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[interrupt],
    )
    before = signal.getsignal(signal.SIGTERM)
    trainer.fit(module, DataLoader(torch.ones(100, 1)))
    assert interrupt.signal_name == "SIGTERM"
    assert (module.batches, trainer.global_step) == (8, 2)
    assert signal.getsignal(signal.SIGTERM) is before


def stops_after(rank: int) -> tuple[int, str | None]:
    """Only rank 1 is signalled, after step 2; both look at each other every third step."""
    interrupt = InterruptCallback(agree_every_steps=3)
    trainer = SimpleNamespace(
        global_step=0,
        should_stop=False,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_should_accumulate=lambda: False)),
    )
    while not trainer.should_stop and trainer.global_step < 9:
        trainer.global_step += 1
        if rank == 1 and trainer.global_step == 2:
            interrupt.signal_name = "SIGUSR1"
        interrupt.on_train_batch_end(trainer, SimpleNamespace(device=torch.device("cpu")), None, None, 0)
    return trainer.global_step, interrupt.signal_name


def test_a_signal_on_one_rank_stops_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    assert on_two_ranks(stops_after, tmp_path) == [(3, "signal on another rank"), (3, "SIGUSR1")]
