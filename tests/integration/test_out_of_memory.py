"""A training whose memory is full ends with one error of the user's kind, on the rank that it happened to."""

import pytest
import pytorch_lightning as pl
import torch

from blip2train.cli import out_of_memory
from blip2train.cli.estimate import estimate
from blip2train.cli.out_of_memory import estimated_peak
from blip2train.errors import ConfigError


class FullMemory(pl.Callback):
    """The allocator's error in the second backward pass."""

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        if trainer.global_step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_full_memory_says_where_it_was_and_what_to_turn(laboratory, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(out_of_memory, "estimated_peak", lambda config: None)
    with pytest.raises(ConfigError, match=r"out of memory in backward of batch 2 \(step 1\): CUDA") as caught:
        laboratory.train("microworld_stage1", tmp_path / "run", "+callback.full._target_=test_out_of_memory.FullMemory")
    assert "stage.micro_batch_size=4" in str(caught.value)
    assert "model.qformer.checkpoint_activations=true" in str(caught.value)


@pytest.mark.slow
def test_the_estimate_in_the_message_is_that_of_show_estimate(laboratory, tmp_path) -> None:
    config = laboratory.compose("microworld_stage1", tmp_path / "run")
    expected = estimate(config, accelerator=False).peak / (1 << 30)
    assert estimated_peak(config) == f"{expected:.2f} GiB at its peak for 8 pairs per device"
