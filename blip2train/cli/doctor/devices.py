"""Check "devices": the GPUs or CPUs that the config asks for, and what else of the machine a loader depends on.

Nothing here opens a CUDA context: it would take memory from the step that is tried later.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from blip2train.cli import check
from blip2train.cli.doctor.context import Context, devices_per_node, uses_gpu
from blip2train.cli.doctor.row import Row
from blip2train.model.memory import GIB

CHECK = "devices"
BF16_FROM = 8
"""Compute capability from which a GPU multiplies bf16 itself (Ampere); older ones emulate it, many times slower."""
MEMORY_IN_USE = 1.0
"""GiB of a GPU; what an idle one shows stays below."""
FILES_AT_LEAST = 1024
"""Open files: the usual limit of a login. A loader passes a descriptor for every tensor, beside its shards."""
SKEW_AT_MOST = 2.0
"""Seconds between the clocks of machines: file times and the signatures of stores' urls bear that."""

_SMI_FIELDS = ("uuid", "name", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Args:
        name: its model.
        memory: GiB.
        capability: (major, minor).
        used: GiB that are in use now; None where nvidia-smi does not say.
        ecc_errors: uncorrected memory errors since the last restart; None where it does not count.
    """

    name: str
    memory: float
    capability: tuple[int, int]
    used: float | None = None
    ecc_errors: int | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """What one machine gives its processes.

    Args:
        cpus: cores that this process may use, by affinity and control group.
        memory: bytes that are free, by the kernel and the control group.
        shared_memory: free bytes of /dev/shm; None where there is none.
        open_files: the soft limit.
    """

    cpus: float
    memory: int
    shared_memory: int | None
    open_files: int


def check_devices(context: Context) -> Iterator[Row]:
    """GPUs, then cores, shared memory and open files."""
    config, gpus = context.config, num_gpus()
    wanted = devices_per_node(config, gpus)
    yield judge_launch(wanted, int(config.trainer.get("num_nodes", 1)), context.launch.world)
    host = read_host()
    if uses_gpu(config, gpus):
        yield from judge_gpus(wanted, read_gpus(gpus), str(config.trainer.get("precision") or "32-true"))
    elif wanted > host.cpus:
        fix = "trainer.devices at most the number of cores"
        yield Row(CHECK, "warn", f"{wanted} processes on {host.cpus:g} cores", fix)
    workers = int(config.data.get("num_workers", 0)) if config.data else 0
    yield judge_cpus(wanted, workers, host.cpus)
    if workers and config.data:
        yield judge_shared_memory(host.shared_memory, wanted * batch_bytes(config) * prefetched(config))
    yield judge_open_files(host.open_files)


def num_gpus() -> int:
    """GPUs that torch can use here."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def judge_launch(wanted: int, nodes: int, world: int) -> Row:
    """The number of processes that were started against the number that the config asks for."""
    asked = f"{wanted} device(s) on {nodes} machine(s)"
    if world not in (1, wanted * nodes):
        return Row(
            CHECK,
            "fail",
            f"the config asks for {asked}, the launcher has started {world} processes",
            "make trainer.devices x trainer.num_nodes the number of processes of torchrun or srun",
        )
    if nodes > 1 and world == 1:
        return Row(
            CHECK,
            "fail",
            f"the config asks for {asked}, this is a single process",
            "start the doctor as the training: one process per device, by torchrun or srun",
        )
    return Row(CHECK, "ok", f"{asked}, {f'{world} processes started' if world > 1 else 'started from here'}")


def judge_gpus(wanted: int, gpus: Sequence[Gpu], precision: str) -> Iterator[Row]:
    """As many as wanted, with the number format that is wanted, free, and without memory errors."""
    if len(gpus) < wanted:
        names = ", ".join(gpu.name for gpu in gpus) or "none"
        fix = f"trainer.devices={len(gpus)}" if gpus else "start it on a machine with GPUs, or trainer=cpu"
        yield Row(CHECK, "fail", f"{wanted} GPUs asked for, torch finds {len(gpus)} ({names})", fix)
    if not gpus:
        return
    kinds = sorted(
        {f"{gpu.name} {gpu.memory:.0f} GiB, compute {gpu.capability[0]}.{gpu.capability[1]}" for gpu in gpus}
    )
    several = len({(gpu.name, round(gpu.memory)) for gpu in gpus}) > 1
    fix = "the slowest and smallest sets the pace: CUDA_VISIBLE_DEVICES= chooses equal ones" if several else ""
    yield Row(CHECK, "warn" if several else "ok", f"{len(gpus)} x {'; '.join(kinds)}", fix)
    if "bf16" in precision and any(gpu.capability[0] < BF16_FROM for gpu in gpus):
        yield Row(CHECK, "warn", f"precision {precision} on a GPU that emulates bf16", "trainer.precision=16-mixed")
    busy = [f"GPU {place}: {gpu.used:.1f} GiB" for place, gpu in enumerate(gpus) if (gpu.used or 0) > MEMORY_IN_USE]
    if busy:
        yield Row(CHECK, "warn", f"memory in use by others: {', '.join(busy)}", "nvidia-smi names the processes")
    bad = [f"GPU {place}: {gpu.ecc_errors}" for place, gpu in enumerate(gpus) if gpu.ecc_errors]
    if bad:
        fix = "restart the machine; where they come again have the GPU replaced"
        yield Row(CHECK, "warn", f"uncorrected memory errors: {', '.join(bad)}", fix)


def judge_cpus(processes: int, workers: int, cpus: float) -> Row:
    """A core for every training process and loader process."""
    needed = processes * (1 + workers)
    measured = f"{cpus:g} cores for {processes} process(es) with {workers} loader worker(s) each"
    if needed > cpus:
        fix = "fewer data.num_workers, or more cores (srun --cpus-per-task): they take turns, and the device may wait"
        return Row(CHECK, "warn", measured, fix)
    return Row(CHECK, "ok", measured)


def judge_shared_memory(free: int | None, needed: int) -> Row:
    """Room for the batches that loader workers hand over."""
    if free is None:
        return Row(CHECK, "warn", "no /dev/shm, through which loader workers hand batches over", "data.num_workers=0")
    measured = f"/dev/shm has {free / 1e6:,.0f} MB free, batches on their way need {needed / 1e6:,.0f} MB"
    if free < needed:
        fix = "a larger one (docker --shm-size=8g or --ipc=host), or a smaller data.prefetch_factor"
        return Row(CHECK, "fail", measured, fix)
    if free < 2 * needed:
        return Row(CHECK, "warn", measured, "leave twice the need: docker --shm-size=8g or --ipc=host")
    return Row(CHECK, "ok", measured)


def judge_open_files(limit: int) -> Row:
    if limit < FILES_AT_LEAST:
        return Row(CHECK, "warn", f"{limit} open files allowed", f"ulimit -n {FILES_AT_LEAST} or more before the start")
    return Row(CHECK, "ok", f"{limit} open files allowed")


def judge_clocks(times: Mapping[str, float]) -> Row:
    """Clocks of several machines, read at the same moment, in seconds."""
    skew = max(times.values()) - min(times.values())
    measured = f"the clocks of {len(times)} machines are at most {skew:.1f} s apart"
    if skew > SKEW_AT_MOST:
        late = min(times, key=lambda name: times[name])
        return Row(CHECK, "warn", f"{measured}; {late} is the slowest", "let chrony or ntpd set them")
    return Row(CHECK, "ok", measured)


def read_clock() -> float:
    return time.time()


def batch_bytes(config: DictConfig) -> int:
    """Bytes of one device's batch as a worker hands it over: images as uint8, texts and masks."""
    side, texts = int(config.model.vision_encoder.image.size), int(config.data.collator.get("max_tokens", 32))
    return check.device_batch(config) * (3 * side * side + 2 * 9 * texts)


def prefetched(config: DictConfig) -> int:
    """Batches of one device that may be on their way at once: prepared ahead, and one being used."""
    return int(config.data.get("prefetch_factor", 2)) + 1


def read_gpus(count: int) -> list[Gpu]:
    """The GPUs that torch finds, with what nvidia-smi knows of each."""
    import torch

    known = {row["uuid"]: row for row in _nvidia_smi(_SMI_FIELDS)}
    gpus = []
    for place in range(count):
        facts = torch.cuda.get_device_properties(place)
        row = known.get(f"GPU-{getattr(facts, 'uuid', '')}", {})
        used, errors = row.get("memory.used", ""), row.get("ecc.errors.uncorrected.volatile.total", "")
        gpus.append(
            Gpu(
                facts.name,
                facts.total_memory / GIB,
                (facts.major, facts.minor),
                float(used) / 1024 if used.isdecimal() else None,
                int(errors) if errors.isdecimal() else None,
            )
        )
    return gpus


def driver_version() -> str | None:
    """NVIDIA's driver; None where nvidia-smi finds none."""
    rows = _nvidia_smi(("driver_version",))
    return rows[0]["driver_version"] if rows else None


def _nvidia_smi(fields: Sequence[str]) -> list[dict[str, str]]:
    """One row per GPU of the machine, also of those that this process may not use; none without nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[word.strip() for word in line.split(",")] for line in said.splitlines() if line.strip()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def read_host() -> Host:
    """Cores, memory, shared memory and open files, as this process may use them."""
    cpus = float(len(os.sched_getaffinity(0)))
    quota = _words(Path("/sys/fs/cgroup/cpu.max"))
    if len(quota) == 2 and quota[0].isdecimal():
        cpus = min(cpus, int(quota[0]) / int(quota[1]))
    shm = Path("/dev/shm")
    return Host(
        cpus=cpus,
        memory=free_memory(),
        shared_memory=shutil.disk_usage(shm).free if shm.is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def free_memory() -> int:
    """Bytes of main memory that are free here, within the limit of the control group where it has one."""
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    free = int(rows["MemAvailable"].split()[0]) * 1024
    limit, current = _words(Path("/sys/fs/cgroup/memory.max")), _words(Path("/sys/fs/cgroup/memory.current"))
    if limit and current and limit[0].isdecimal():
        free = min(free, max(0, int(limit[0]) - int(current[0])))
    return free


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
