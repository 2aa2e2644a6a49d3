"""Check "memory": what the config's step needs, estimated and measured, against what the devices and machines have."""

from __future__ import annotations

from collections.abc import Iterator

from blip2train.cli.doctor.context import Context, StepMeasure, devices_per_node, uses_gpu
from blip2train.cli.doctor.devices import free_memory, num_gpus, read_gpus
from blip2train.cli.doctor.row import Row
from blip2train.errors import ConfigError
from blip2train.model.memory import GIB

CHECK = "memory"
FILLED_AT_MOST = 0.9
"""Of a device: CUDA's context, NCCL's buffers and what the allocator cannot use take the rest."""
LESS = (
    "a smaller data.batch_size with more trainer.accumulate_grad_batches, model.qformer.checkpoint_activations=true, "
    "or a sharded trainer= (fsdp2, deepspeed_zero2)"
)


def check_memory(context: Context) -> Iterator[Row]:
    """The estimate with texts of full length, and the peaks of the steps that were tried."""
    from blip2train.cli.estimate import estimate

    gpus = num_gpus()
    on_gpu, processes = uses_gpu(context.config, gpus), devices_per_node(context.config, gpus)
    free = free_memory()
    context.say("estimating the memory of a step")
    try:
        peak = estimate(context.to_build, accelerator=on_gpu).peak
    except ConfigError as error:
        yield Row(CHECK, "skip", f"no estimate: {error.found}", "the measure of the steps stands alone")
    else:
        known = read_gpus(gpus) if on_gpu else []
        limit = min(gpu.memory for gpu in known) * GIB if known else None if on_gpu else free / processes
        yield judge_estimate(peak, limit)
    step = context.facts.step
    if step is not None:
        if step.device_bytes:
            yield judge_peak(step)
        yield judge_host(step.host_bytes, processes, free)


def judge_estimate(peak: int, limit: float | None) -> Row:
    """The estimate of a device's peak against the memory it has, in bytes; None where there is no such device here."""
    measured = f"estimated for texts of full length: {peak / GIB:.2f} GiB per device"
    if limit is None:
        return Row(CHECK, "skip", measured, "no device here to compare it with")
    measured += f", {100 * peak / limit:.0f} % of {limit / GIB:.1f} GiB"
    if peak > limit:
        return Row(CHECK, "fail", measured, LESS)
    return Row(
        CHECK,
        "warn" if peak > FILLED_AT_MOST * limit else "ok",
        measured,
        LESS if peak > FILLED_AT_MOST * limit else "",
    )


def judge_peak(step: StepMeasure) -> Row:
    """What torch had reserved at most; batches with longer texts may come."""
    share = step.peak_bytes / step.device_bytes
    measured = (
        f"measured: {step.peak_bytes / GIB:.1f} GiB, {100 * share:.0f} % of a GPU's {step.device_bytes / GIB:.1f}"
    )
    if share > FILLED_AT_MOST:
        return Row(CHECK, "warn", f"{measured}; batches with longer texts need more", LESS)
    return Row(CHECK, "ok", measured)


def judge_host(resident: int, processes: int, free: int) -> Row:
    """Main memory of the training processes of one machine, in bytes, against what was free before they started."""
    share = resident * processes / max(free, 1)
    measured = f"main memory: {processes} x {resident / GIB:.1f} GiB, {100 * share:.0f} % of {free / GIB:.1f} GiB free"
    if share > FILLED_AT_MOST:
        fix = "fewer devices per machine, or a machine with more memory; loader workers come on top"
        return Row(CHECK, "warn", measured, fix)
    return Row(CHECK, "ok", measured)
