from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from test_optim_param_group import Toy
from torch import Tensor, nn

from blip2train.errors import ConfigError
from blip2train.optim.adamw import build_adamw

SETTINGS: dict[str, Any] = {"lr": 1e-4, "warmup_steps": 2, "max_steps": 10, "min_lr": 1e-5}


def test_the_papers_settings_are_the_defaults() -> None:
    optimizer, _ = build_adamw(Toy(), **SETTINGS)
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert by_name["decay"]["weight_decay"] == 0.05
    assert by_name["no_decay"]["weight_decay"] == 0.0
    assert all(group["betas"] == (0.9, 0.98) for group in optimizer.param_groups)


def test_rates_run_from_warm_up_to_exactly_the_minimum() -> None:
    optimizer, scheduler = build_adamw(nn.Linear(2, 2), **SETTINGS, warmup_start_lr=1e-6)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(1e-6 + (1e-4 - 1e-6) / 2, rel=1e-12)
    assert rates[1] == 1e-4
    assert rates[-1] == pytest.approx(1e-5, rel=1e-15)
    assert rates[-2] > rates[-1]


def test_the_staircase_is_chosen_by_name_and_its_cut_warm_up_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Two epochs of five: 4 of 8 warm-up steps from 1e-6, then one rate at half a cosine period."""
    settings = SETTINGS | {"warmup_steps": 8, "warmup_start_lr": 1e-6}
    with caplog.at_level("WARNING"):
        optimizer, scheduler = build_adamw(nn.Linear(2, 2), **settings, schedule="epoch_staircase", steps_per_epoch=5)
    assert "warm-up of 8 steps is cut off" in caplog.text
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    warming = [1e-6 + (1e-4 - 1e-6) * step / 8 for step in range(5)]
    assert rates == pytest.approx([*warming, *[5.5e-5] * 5], rel=1e-12)


def test_an_update_is_adamw_by_its_definition_in_float64() -> None:
    model = nn.Linear(3, 2).double()
    optimizer, _ = build_adamw(model, lr=1e-2, warmup_steps=0, max_steps=10**9, min_lr=0.0)
    generator = torch.Generator().manual_seed(0)
    expected = {name: item.detach().clone() for name, item in model.named_parameters()}
    first = {name: torch.zeros_like(item) for name, item in expected.items()}
    second = {name: torch.zeros_like(item) for name, item in expected.items()}
    for step in range(1, 5):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            first[name] = 0.9 * first[name] + 0.1 * parameter.grad
            second[name] = 0.98 * second[name] + 0.02 * parameter.grad**2
            if name == "weight":
                expected[name] *= 1 - 1e-2 * 0.05
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.98**step)
            expected[name] -= 1e-2 * mean / (square.sqrt() + 1e-8)
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-12)


def test_the_fused_kernel_is_used_on_the_cpu_and_not_where_it_does_not_exist() -> None:
    assert build_adamw(nn.Linear(2, 2), **SETTINGS)[0].param_groups[0]["fused"]
    assert not build_adamw(nn.Linear(2, 2, device="meta"), **SETTINGS)[0].param_groups[0]["fused"]


class _Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = build_adamw(self.layer, **SETTINGS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_lightning_clips_gradients_under_bfloat16_with_the_fused_kernel() -> None:
    module = _Module()
    before = module.layer.weight.detach().clone()
    trainer = pl.Trainer(
        accelerator="cpu", precision="bf16-mixed", gradient_clip_val=1.0, max_steps=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2))
    assert not torch.equal(module.layer.weight.detach(), before)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"warmup_steps": 10}, "warmup_steps"),
        ({"warmup_steps": 11}, "warmup_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": -1}, "max_steps"),
        ({"min_lr": 1e-3}, "min_lr"),
        ({"min_lr": -1.0}, "min_lr"),
        ({"warmup_start_lr": 1e-3}, "warmup_start_lr"),
        ({"lr": 0.0}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"schedule": "linear"}, "optim.schedule"),
        ({"steps_per_epoch": 5}, "knows no epochs"),
        ({"schedule": "epoch_staircase"}, "steps_per_epoch is None"),
        ({"schedule": "epoch_staircase", "steps_per_epoch": 0}, "steps_per_epoch is 0"),
        ({"schedule": "epoch_staircase", "steps_per_epoch": 3}, "max_steps is 10 and steps_per_epoch is 3"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        build_adamw(nn.Linear(2, 2), **(SETTINGS | change))
