"""What the doctor says of a machine: each of its judgements where all is well, where it is tight, where it fails."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from blip2train.callback import step_probe
from blip2train.cli.config import compose
from blip2train.cli.doctor import devices, disk, duration, interconnect, memory, versions
from blip2train.cli.doctor.config import check_config, judge_resume
from blip2train.cli.doctor.context import (
    Context,
    Facts,
    StepMeasure,
    devices_per_node,
    uses_gpu,
    world_size,
    zero_stage,
)
from blip2train.cli.doctor.devices import Gpu
from blip2train.cli.doctor.launch import Launch
from blip2train.errors import ConfigError
from blip2train.model.memory import GIB

STEP = StepMeasure((5.0, 2.0, 2.0), (3.0, 0.0, 0.1), 96, 60 * GIB, 100 * GIB, 10 * GIB, 2)
A100 = Gpu("A100", 40, (8, 0))


def config(*overrides: str):
    return compose("doctor", ["experiment=microworld_stage1", "run_dir=outputs/x", *overrides])


def test_a_new_run_and_one_that_goes_on(tmp_path: Path) -> None:
    context = Context(config(f"run_dir={tmp_path / 'run'}"), Launch())
    subject, folder = check_config(context)
    assert subject.status == folder.status == "ok" and "a new run in" in folder.measured
    assert context.built is not None and context.resume is None
    assert judge_resume(tmp_path / "step-0000300", 300, 600).status == "ok"
    assert judge_resume(tmp_path / "step-0000600", 600, 600).status == "fail"


def test_versions_within_their_ranges_and_others() -> None:
    wanted, tested = [Requirement("torch>=2.11,<2.13"), Requirement("timm>=1.0")], {"torch": "2.11.0"}
    row = versions.judge_packages(wanted, {"torch": "2.12.0+cu130", "timm": "1.1"}, tested, ["torch"])
    assert row.status == "ok" and "torch 2.12.0+cu130 (tested: 2.11.0)" in row.measured
    row = versions.judge_packages(wanted, {"torch": "2.11.0+cpu", "timm": "1.1"}, tested, ["torch"])
    assert row.status == "ok" and "tested" not in row.measured
    row = versions.judge_packages(wanted, {"torch": "2.13.0"}, tested, ["torch"])
    assert row.status == "fail" and "timm is not installed" in row.measured and "torch 2.13.0 (wanted" in row.measured


def test_deepspeed_is_asked_for_where_the_strategy_is_its() -> None:
    def names(extras: set[str]) -> set[str]:
        return {item.name for item in versions.requirements(extras)}

    assert "deepspeed" not in names(set()) and "torch" in names(set())
    assert names({"deepspeed"}) - names(set()) == {"deepspeed"}
    assert zero_stage(config("trainer=deepspeed_zero2_offload", "trainer.devices=2")) == 2
    assert zero_stage(config("trainer=fsdp2", "trainer.devices=2")) is zero_stage(config()) is None


@pytest.mark.parametrize(
    ("facts", "status"),
    [(("13.0", "580.1", "2.28.9"), "ok"), (("13.0", "580.1", None), "warn"), (("13.0", None, None), "fail")],
)
def test_cuda(facts: tuple[str | None, str | None, str | None], status: str) -> None:
    assert versions.judge_cuda(*facts).status == status
    assert versions.judge_cuda(None, *facts[1:]).status == "fail"


@pytest.mark.parametrize(
    ("overrides", "gpus", "number"),
    [
        (["trainer.devices=3"], 0, 3),
        (["trainer.devices=auto"], 4, 1),  # of CPUs
        (["trainer.devices=auto", "trainer.accelerator=gpu"], 4, 4),
        (["trainer.devices=-1", "trainer.accelerator=auto"], 8, 8),
        (["trainer.devices=[0,2]", "trainer.accelerator=gpu", "trainer.num_nodes=2"], 8, 4),
        (["trainer.devices='2'"], 0, 2),
    ],
)
def test_ranks_of_a_config(overrides: list[str], gpus: int, number: int) -> None:
    assert world_size(config(*overrides), gpus) == number


def test_devices_that_are_no_number_are_refused() -> None:
    with pytest.raises(ConfigError, match="devices is 'many'"):
        devices_per_node(config("trainer.devices=many"), 0)
    assert uses_gpu(config("trainer.accelerator=auto"), 1) and not uses_gpu(config("trainer.accelerator=auto"), 0)


def test_processes_started_against_those_asked_for() -> None:
    assert devices.judge_launch(8, 1, 1).status == "ok"  # train starts them itself
    assert devices.judge_launch(8, 2, 16).status == "ok"
    assert devices.judge_launch(8, 2, 8).status == "fail"
    assert devices.judge_launch(8, 2, 1).status == "fail"


def test_gpus() -> None:
    (row,) = devices.judge_gpus(2, [A100, A100], "bf16-mixed")
    assert row.status == "ok" and row.measured == "2 x A100 40 GiB, compute 8.0"
    few = list(devices.judge_gpus(4, [A100], "bf16-mixed"))
    assert few[0].status == "fail" and few[0].advice == "trainer.devices=1"
    (none,) = devices.judge_gpus(1, [], "32-true")
    assert none.status == "fail" and "trainer=cpu" in none.advice


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        (Gpu("V100", 40, (7, 0)), "emulates bf16"),
        (Gpu("A100", 40, (8, 0), used=12.5), "GPU 1: 12.5 GiB"),
        (Gpu("A100", 40, (8, 0), used=0.4, ecc_errors=3), "GPU 1: 3"),
        (Gpu("A100", 80, (8, 0)), "80 GiB"),
    ],
)
def test_a_gpu_that_is_not_as_the_others(gpu: Gpu, said: str) -> None:
    warned = [row for row in devices.judge_gpus(2, [A100, gpu], "bf16-mixed") if row.status == "warn"]
    assert any(said in row.measured and row.advice for row in warned)


def test_what_nvidia_smi_prints_is_read_by_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU-b, B, 40960, 2048, 1'\necho 'GPU-a, A, 40960, 3, [N/A]'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    facts = SimpleNamespace(name="A", total_memory=40 * GIB, major=8, minor=0, uuid="a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: facts)
    assert devices.read_gpus(1) == [Gpu("A", 40.0, (8, 0), 3 / 1024, None)]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert devices.driver_version() is None


def test_cores_shared_memory_files_and_clocks() -> None:
    assert devices.judge_cpus(2, 3, 8).status == "ok" and devices.judge_cpus(2, 4, 8).status == "warn"
    sizes = (None, 90, 150, 200)
    assert [devices.judge_shared_memory(size, 100).status for size in sizes] == ["warn", "fail", "warn", "ok"]
    assert devices.judge_open_files(256).status == "warn" and devices.judge_open_files(1024).status == "ok"
    late = devices.judge_clocks({"a": 100.0, "b": 93.0, "c": 100.5})
    assert late.status == "warn" and "b is the slowest" in late.measured
    assert devices.judge_clocks({"a": 100.0, "b": 100.1}).status == "ok"


def test_batches_on_their_way_are_those_of_the_loader() -> None:
    wanted = config("data.batch_size=10", "data.prefetch_factor=3", "data.collator.max_tokens=20")
    assert devices.batch_bytes(wanted) == 10 * (3 * 64 * 64 + 2 * 20 * 9)  # pixels; ids of 8 bytes and a mask of 1
    assert devices.prefetched(wanted) == 4


def test_this_machine_can_be_read() -> None:
    host = devices.read_host()
    assert 0 < host.cpus <= (os.cpu_count() or 1) and host.memory > 1e8 and host.open_files > 0


def test_room_for_checkpoints() -> None:
    sizes = (50, 150, 250)
    rows = [disk.judge_room(Path("/r"), free, 40, 100) for free in sizes]
    assert [row.status for row in rows] == ["fail", "warn", "ok"] and "keep_last" in rows[0].advice
    assert disk.judge_rate(10**9, 10**8).status == "ok" and disk.judge_rate(10**10, 10**8).status == "warn"


def test_a_trial_file_is_written_and_removed(tmp_path: Path) -> None:
    assert disk.try_to_write(tmp_path, 3 << 20) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_fails_with_its_reason_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk.os, "fsync", full)
    context = Context(config(f"run_dir={tmp_path / 'run'}"), Launch())
    rows = list(disk.check_disk(context))
    assert rows[-1].status == "fail" and "No space left" in rows[-1].measured
    assert list(tmp_path.iterdir()) == [] and context.facts.write_bytes_per_s is None


def test_the_size_of_checkpoints_is_that_of_the_model(tmp_path: Path) -> None:
    context = Context(config(f"run_dir={tmp_path / 'run'}", "checkpoint.keep_last=3"), Launch())
    rows = list(disk.check_disk(context))
    assert {row.status for row in rows} == {"ok"}
    assert context.facts.checkpoint_bytes == 12 * (context.facts.trainable_parameters or 0) > 0


def test_folders_of_loggers_and_cache_outside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk.other_folders(config("logger=tensorboard")) == {}
    elsewhere = config("logger=tensorboard", f"logger.tensorboard.folder={tmp_path / 'boards'}")
    assert disk.other_folders(elsewhere) == {"logger.tensorboard.folder": tmp_path / "boards"}
    remote = config("data.datasets.microworld.urls=['s3://b/s-{0..3}.tar']", f"data.cache.folder={tmp_path / 'copies'}")
    assert disk.other_folders(remote) == {"data.cache.folder": tmp_path / "copies"}
    assert disk.judge_folder("data.cache.folder", tmp_path / "copies").status == "ok"
    monkeypatch.setattr(disk.os, "access", lambda path, mode: False)
    assert disk.judge_folder("data.cache.folder", tmp_path / "copies").status == "fail"


def test_memory_against_its_limit() -> None:
    limits = (None, 9 * GIB, 10.5 * GIB, 20 * GIB)
    assert [memory.judge_estimate(10 * GIB, limit).status for limit in limits] == ["skip", "fail", "warn", "ok"]
    assert memory.judge_peak(STEP).status == "ok"
    assert memory.judge_peak(StepMeasure((1.0,), (0.0,), 1, 95, 100, 1, 1)).status == "warn"
    assert memory.judge_host(10, 2, 100).status == "ok" and memory.judge_host(10, 8, 85).status == "warn"


def test_memory_of_the_real_config_with_and_without_a_measured_step() -> None:
    context = Context(config(), Launch())
    (estimate,) = memory.check_memory(context)
    assert estimate.status == "ok" and "full length" in estimate.measured
    context.facts.step = STEP
    assert [row.measured.split(":")[0] for row in memory.check_memory(context)][1:] == ["measured", "main memory"]


def test_steps_are_timed_without_the_first() -> None:
    assert STEP.seconds == 2.0 and STEP.waiting == pytest.approx(0.025)
    assert StepMeasure((5.0,), (1.0,), 1, 0, 0, 0, 1).seconds == 5.0


def test_duration_data_and_saving() -> None:
    row = duration.judge_duration(STEP, 250_000, None)
    assert row.status == "ok" and "5 d 18 h" in row.measured and "estimated from 2 steps" in row.measured
    assert duration.judge_duration(STEP, 250_000, 3600.0).status == "warn"
    assert duration.judge_duration(STEP, 100, 3600.0).status == "ok"
    assert duration.judge_data(STEP, None, 2).status == "ok"
    assert duration.judge_data(STEP, 100.0, 2).status == "ok"
    slow = duration.judge_data(STEP, 30.0, 2)  # of 48 that the steps take
    assert slow.status == "warn" and "data.num_workers=4" in slow.advice
    waiting = StepMeasure((5.0, 2.0), (3.0, 0.9), 96, 0, 0, 0, 2)
    assert duration.judge_data(waiting, None, 2).status == "warn"
    assert duration.judge_saving(1.0, 600.0).status == "ok" and duration.judge_saving(60.0, 600.0).status == "warn"


@pytest.mark.parametrize(
    ("overrides", "seconds"),
    [
        (["checkpoint.every_steps=0"], None),
        (["checkpoint.every_steps=100"], 50.0),
        (["checkpoint.every_steps=1000", "++checkpoint.every_minutes=5"], 300.0),
        (["checkpoint.every_steps=100", "++checkpoint.every_minutes=5"], 50.0),
    ],
)
def test_the_time_between_checkpoints(overrides: list[str], seconds: float | None) -> None:
    if "++checkpoint.every_minutes=5" not in overrides:
        overrides = [*overrides, "++checkpoint.every_minutes=null"]
    assert duration.saving_interval(config(*overrides), 0.5) == seconds


@pytest.mark.parametrize(
    ("seconds", "words"), [(2.5, "2.5 s"), (75, "1 min 15 s"), (7325, "2 h 2 min"), (86400, "1 d")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert duration.in_words(seconds) == words


def test_time_says_that_nothing_was_measured() -> None:
    (row,) = duration.check_time(Context(config(), Launch()))
    assert row.status == "skip"


def test_bandwidth_is_judged_by_what_a_step_exchanges() -> None:
    # a ring moves 2 (n - 1) / n of the bytes over each link: 256 MiB in 0.1 s over 4 ranks are 4.03 GB/s
    ring = {"world_size": 4, "latency_s": 2e-5, "all_reduce_s": {str(1 << 20): 0.001, str(256 << 20): 0.1}}
    ring |= {"all_to_all_bytes": 10**6, "all_to_all_s": 0.01}
    speed, gradients, negatives = interconnect.judge_ring(ring, 1 << 30, 1.0, on_gpu=True)
    assert speed.status == "ok" and "256 MiB 4.03" in speed.measured and "20 us" in speed.measured
    assert gradients.status == "ok" and "400.0 ms, 40 % of a step" in gradients.measured
    assert negatives.status == "ok" and "1 % of a step" in negatives.measured
    _, gradients, negatives = interconnect.judge_ring(ring, 1 << 30, 0.05, on_gpu=True)
    assert gradients.status == negatives.status == "warn"
    slow = ring | {"all_reduce_s": {str(256 << 20): 1.0}, "all_to_all_s": None, "all_to_all_bytes": None}
    (speed,) = interconnect.judge_ring(slow, None, None, on_gpu=True)
    assert speed.status == "warn" and "NCCL_SOCKET_IFNAME" in speed.advice
    assert next(interconnect.judge_ring(slow, None, None, on_gpu=False)).status == "ok"


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["trainer=ddp"], 4000),  # of float32 gradients
        (["trainer=deepspeed_zero2"], 4000),
        (["trainer=ddp", "trainer.precision=bf16-true"], 2000),
        (["trainer=deepspeed_zero3"], 2000 + 9000),  # scatter gradients, gather all weights twice: half a reduce each
        (["trainer=fsdp2"], 2000 + 9000),
    ],
)
def test_bytes_that_a_step_exchanges_by_strategy(overrides: list[str], size: int) -> None:
    facts = Facts(trainable_parameters=1000, weight_bytes=9000)
    assert interconnect.exchanged_bytes(config(*overrides, "trainer.devices=2"), facts) == size
    assert interconnect.exchanged_bytes(config(), Facts()) is None


def test_bytes_of_negatives_are_image_tokens_of_stage_one() -> None:
    assert interconnect.negatives_bytes(config("data.batch_size=10")) == 10 * 17 * 96 * 4
    assert interconnect.negatives_bytes(config("~objective@stage.objectives.itm")) is None


def test_one_process_exchanges_nothing() -> None:
    (row,) = interconnect.check_interconnect(Context(config(), Launch()))
    assert row.status == "ok"


def test_the_probe_takes_the_slowest_of_each_step_and_the_fullest_gpu() -> None:
    first = {"step_seconds": [1.0, 4.0], "data_seconds": [0.0, 1.0], "samples": 20}
    first |= {"peak_bytes": 50, "device_bytes": 100, "host_bytes": 7}
    second = {"step_seconds": [2.0, 3.0], "data_seconds": [0.5, 0.0], "samples": 10}
    second |= {"peak_bytes": 45, "device_bytes": 50, "host_bytes": 3}
    measure = StepMeasure.from_json(step_probe._together([first, second]))
    assert measure == StepMeasure((2.0, 4.0), (0.5, 1.0), 15, 45, 50, 7, 2)
