"""A full memory becomes one error that says what to turn; every override it offers composes and lowers something."""

import multiprocessing
import resource
import shlex
import sys
from pathlib import Path

import pytest
import torch

from blip2train.cli import out_of_memory as module
from blip2train.cli.config import compose
from blip2train.cli.out_of_memory import is_out_of_memory, out_of_memory, settings_to_turn
from blip2train.errors import DataError

STAGE1 = ["experiment=microworld_stage1", "paths.data=/nowhere"]
STAGE2 = ["experiment=microworld_stage2_opt", "paths.data=/nowhere", "init_from=scratch"]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=9"]
CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


def wrapped(cause: BaseException) -> RuntimeError:
    try:
        try:
            raise cause
        except BaseException as inner:
            raise RuntimeError("the step failed") from inner
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_ALLOCATOR), MemoryError()]
)
def test_allocators_errors_are_known_also_behind_others(error: BaseException) -> None:
    assert is_out_of_memory(error) and is_out_of_memory(wrapped(error))


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), DataError("a", where="b", fix="c"), KeyboardInterrupt()]
)
def test_other_errors_are_left_alone(error: BaseException) -> None:
    assert not is_out_of_memory(error) and not is_out_of_memory(wrapped(error))


def allocate_too_much() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
    try:
        torch.ones(1 << 28)
    except BaseException as error:
        sys.exit(0 if is_out_of_memory(error) else 1)
    sys.exit(2)


def test_the_cpu_allocators_real_error_is_known() -> None:
    process = multiprocessing.get_context("fork").Process(target=allocate_too_much)
    process.start()
    process.join(30)
    assert process.exitcode == 0


@pytest.mark.parametrize("overrides", [[*STAGE1, *TWO], STAGE2], ids=["stage 1 on two", "stage 2"])
def test_each_of_three_settings_composes_and_changes_the_config(overrides: list[str]) -> None:
    config = compose("train", overrides)
    ways = settings_to_turn(config)
    assert len(ways) == 3
    for way in ways[:2] if config.trainer.devices == 1 else ways:
        settings = [word.rstrip(",") for word in shlex.split(way.partition("  (")[0]) if "=" in word][:2]
        settings = settings[:1] if settings[0].startswith("trainer=") else settings
        again = ["trainer.devices=2", "trainer.max_steps=9"] if settings[0].startswith("trainer=") else []
        assert compose("train", [*overrides, *again, *settings]) != config, way


def test_half_the_batch_of_stage_2_keeps_the_global_batch() -> None:
    config = compose("train", [*STAGE2, "data.batch_size=16", "trainer.accumulate_grad_batches=3"])
    assert settings_to_turn(config)[0].startswith("data.batch_size=8 trainer.accumulate_grad_batches=6")


def test_what_is_on_already_is_not_offered() -> None:
    on = ["model.qformer.checkpoint_activations=true", "stage.micro_batch_size=1"]
    offered = "".join(settings_to_turn(compose("train", [*STAGE1, *on])))
    assert "checkpoint_activations" not in offered and "micro_batch_size" not in offered


def test_the_error_holds_the_place_the_estimate_and_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "estimated_peak", lambda config: "1.25 GiB at its peak for 64 pairs per device")
    config = compose("train", [*STAGE1, "data.batch_size=64"])
    error = out_of_memory(
        config, "backward of batch 3 (step 2)", torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")
    )
    text = str(error)
    assert "out of memory in backward of batch 3 (step 2): CUDA out of memory. Tried 2 GiB" in text
    assert "1.25 GiB" in text and "blip2train show estimate" in text and "stage.micro_batch_size=32" in text
