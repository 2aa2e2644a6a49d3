"""The estimate against what real steps allocate: the CPU allocator's own log, and two real ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from two_ranks import on_two_ranks

from blip2train.cli.config import build, compose
from blip2train.cli.dry_step import GRADIENTS, StepMemory, run_step
from blip2train.cli.estimate import estimate, full_batch, loss_of, read_sharing
from blip2train.cli.meta import build_meta, without_weights
from blip2train.distributed import rank
from blip2train.errors import ConfigError
from blip2train.model.memory import gradient_bytes, parse_precision
from blip2train.objective import matching

SMALL = ("data.batch_size=8", "expected_global_batch=null", "run_dir=x")


def small(experiment: str, *overrides: str) -> DictConfig:
    return compose("train", [f"experiment={experiment}", *SMALL, *overrides])


def run_for_real(config: DictConfig) -> StepMemory:
    """One step of a real model with random weights, and one token of padding, as real batches have it."""
    with open_dict(config):
        config.model = without_weights(config)
    model: nn.Module = build(config.model).train()

    def batch() -> Any:
        made = full_batch(config, model)
        for name in ("attention_mask", "prompt_mask", "target_mask"):
            mask = getattr(made, name, None)
            if mask is not None and mask.shape[1]:
                mask[0, -1] = False
        return made

    def mark() -> None:
        with record_function("loss known"):
            pass

    precision = parse_precision(config.trainer.precision)
    return run_step(model, loss_of(config, model), batch, autocast=precision.autocast, on_loss_known=mark)


@pytest.mark.parametrize(
    ("experiment", "precision", "more"),
    [
        ("microworld_stage1", "32-true", ()),
        ("microworld_stage1", "bf16-mixed", ("stage.micro_batch_size=3",)),
        ("microworld_stage2_opt", "32-true", ()),
        ("microworld_stage2_t5", "bf16-mixed", ()),
    ],
)
def test_a_step_takes_what_the_allocator_says(experiment: str, precision: str, more: tuple[str, ...]) -> None:
    config = small(experiment, f"trainer.precision={precision}", *more)
    step = estimate(config, accelerator=False).step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        run_for_real(config)
    # the log also has the model's making: weights, counted as they are when the step begins
    events = log.profiler.kineto_results.events()
    known = next(event.start_ns() for event in events if event.name() == "loss known")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = sum(size for moment, size in changes if moment <= known)
    model = build_meta(config)
    weights = sum(item.numel() * item.element_size() for item in [*model.parameters(), *model.buffers()])
    assert sum(step.kept.values()) == pytest.approx(held - weights, rel=0.02)


def _kept_on_rank(_: int) -> dict[str, dict[str, int]]:
    """With as many images fetched from the other rank as there can be."""

    def other_ranks(similarity: Tensor, *_: object) -> Tensor:
        return (torch.arange(8) + 8 * (1 - rank())) % similarity.shape[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "sample_hard_negatives", other_ranks)
        step = run_for_real(small("microworld_stage1"))
    return {"kept": dict(step.kept), "peak": dict(step.peak)}


@pytest.mark.slow
def test_pretended_ranks_take_the_memory_of_real_ones(tmp_path: Path) -> None:
    real, _ = on_two_ranks(_kept_on_rank, tmp_path)
    pretended = estimate(small("microworld_stage1", "trainer.devices=2"), accelerator=False).step
    alone = estimate(small("microworld_stage1"), accelerator=False).step
    assert pretended.kept == pytest.approx(real["kept"], rel=0.001)
    assert pretended.kept["itm"] > alone.kept["itm"]  # the negatives' images are projected anew


def test_a_gpu_keeps_less_than_the_cpu() -> None:
    overrides = ("model.qformer.dropout=0.1",)
    fused, plain = (estimate(small("microworld_stage1", *overrides), accelerator=on) for on in (True, False))
    assert sum(fused.step.kept.values()) < sum(plain.step.kept.values())


def test_checkpointing_and_micro_batches_keep_less_and_change_nothing_else() -> None:
    plain = estimate(small("microworld_stage1"))
    saving = estimate(small("microworld_stage1", "model.qformer.checkpoint_activations=true"))
    assert saving.fixed == plain.fixed and saving.step.kept["itm"] < 0.6 * plain.step.kept["itm"]
    chunks = estimate(small("microworld_stage1", "stage.micro_batch_size=2"))
    assert chunks.fixed == plain.fixed and sum(chunks.step.peak.values()) < 0.6 * sum(plain.step.peak.values())


def test_gradients_stay_where_they_are_accumulated_and_leave_where_they_are_sharded() -> None:
    config = small("microworld_stage1")
    size = gradient_bytes(build_meta(config))
    assert estimate(config).step.kept[GRADIENTS] == size  # of the step before
    added = estimate(small("microworld_stage1", "trainer.accumulate_grad_batches=2")).step
    assert added.kept[GRADIENTS] == added.peak[GRADIENTS] == size
    sharded = estimate(
        small("microworld_stage1", "trainer=deepspeed_zero2", "trainer.devices=4", "trainer.max_steps=999")
    )
    assert sharded.fixed[GRADIENTS] == -(-size // 4) and GRADIENTS not in sharded.step.kept


def test_shorter_texts_and_dropped_losses_take_less() -> None:
    config = small("microworld_stage1")
    whole = sum(estimate(config).step.kept.values())
    assert sum(estimate(config, text_tokens=4).step.kept.values()) < whole
    without = estimate(small("microworld_stage1", "~objective@stage.objectives.itg")).step
    assert "itg" not in without.kept and sum(without.kept.values()) < whole


@pytest.mark.parametrize(
    ("overrides", "devices", "zero_stage"),
    [
        (["trainer=ddp", "trainer.devices=8", "trainer.num_nodes=2", "trainer.max_steps=999"], 16, None),
        (["trainer=deepspeed_zero3", "trainer.devices=1", "trainer.max_steps=999"], 1, 3),
        (["trainer=deepspeed_zero2", "trainer.devices=4", "trainer.max_steps=999"], 4, 2),
    ],
)
def test_devices_and_strategy_are_read(overrides: list[str], devices: int, zero_stage: int | None) -> None:
    sharing = read_sharing(small("microworld_stage1", *overrides))
    assert (sharing.devices, sharing.zero_stage) == (devices, zero_stage)


@pytest.mark.parametrize(
    ("override", "message"),
    [("trainer.devices=-1", "devices is -1"), ("+trainer.strategy=fsdp", "strategy 'fsdp' writes")],
)
def test_what_cannot_be_estimated_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_sharing(small("microworld_stage1", override))


def test_losses_that_all_weigh_nothing_are_refused() -> None:
    weights = [f"stage.objectives.{name}.weight=0" for name in ("itc", "itm", "itg")]
    with pytest.raises(ConfigError, match="no loss has a weight"):
        loss_of(small("microworld_stage1", *weights), None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["paper", "lavis"])
@pytest.mark.parametrize("experiment", ["stage1_vitg", "stage2_vitg_opt_2_7b", "stage2_vitg_flan_t5_xl"])
def test_presets_are_estimated_at_full_size(kind: str, experiment: str) -> None:
    start = ["init_from=scratch"] if "stage2" in experiment else []
    result = estimate(compose("train", [f"experiment={kind}/{experiment}", "run_dir=x", *start]))
    assert 5 * 2**30 < result.kept <= result.peak < 80 * 2**30
