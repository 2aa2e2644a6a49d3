"""A signal ends a run between optimizer steps, never inside one, and on all ranks after the same one."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from two_ranks import on_two_ranks

from blip2train.callback.interrupt import InterruptCallback, silence_lightning
from blip2train.callback.stop_signal import StopSignal, Wish


class Line(pl.LightningModule):
    """Counts its micro-batches; the one called `signal_at` sends this process a SIGTERM."""

    def __init__(self, signal_at: int, stop: StopSignal) -> None:
        super().__init__()
        self.weight, self.signal_at, self.batches = torch.nn.Parameter(torch.ones(1)), signal_at, 0
        self.stop = stop

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.batches += 1
        if self.batches == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.stop.wish:  # another thread takes notice
                pass
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_signal_between_micro_batches_waits_for_the_optimizer_step() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        interrupt, module = InterruptCallback(stop), Line(5, stop)
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
        silence_lightning(trainer)
        trainer.fit(module, DataLoader(torch.ones(100, 1)))
    assert (stop.signal_name, interrupt.agreed) == ("SIGTERM", Wish.PREEMPT)
    assert (module.batches, trainer.global_step) == (8, 2)
    assert signal.getsignal(signal.SIGTERM) is before


def stops_after(rank: int, wishes: list[Wish]) -> tuple[int, Wish]:
    """The ranks hear `wishes` during step 2."""
    interrupt = InterruptCallback(StopSignal())
    trainer = SimpleNamespace(
        global_step=0,
        should_stop=False,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_should_accumulate=lambda: False)),
    )
    interrupt.on_train_start(trainer, None)
    while not trainer.should_stop and trainer.global_step < 9:
        trainer.global_step += 1
        if trainer.global_step == 2:
            interrupt.stop.wish = wishes[rank]
        interrupt.on_train_batch_end(trainer, None, None, None, 0)
    return trainer.global_step, interrupt.agreed


def test_a_signal_on_one_rank_stops_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    assert on_two_ranks(stops_after, tmp_path, [Wish.NONE, Wish.PREEMPT]) == [(3, Wish.PREEMPT)] * 2


def test_ranks_that_heard_different_signals_leave_with_one_code(tmp_path: Path) -> None:
    ended = on_two_ranks(stops_after, tmp_path, [Wish.INTERRUPT, Wish.PREEMPT])
    assert [wish.exit_code for _, wish in ended] == [75, 75]
