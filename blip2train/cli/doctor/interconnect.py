"""Check "interconnect": how fast the training's processes exchange numbers, against what a step has to exchange."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from blip2train.cli import check
from blip2train.cli.doctor.child import last_words, run_children
from blip2train.cli.doctor.context import Context, Facts, shards_weights, uses_gpu, world_size
from blip2train.cli.doctor.devices import num_gpus
from blip2train.cli.doctor.row import Row
from blip2train.run_dir import read_json

CHECK = "interconnect"
MIB = 1 << 20
SIZES_GPU = (1 * MIB, 16 * MIB, 256 * MIB)
SIZES_CPU = (1 * MIB, 8 * MIB, 32 * MIB)
HIDDEN_AT_MOST = 0.5
"""Share of a step that the gradients may be on their way: they travel during the backward pass, which is about half of
a step, and cannot be hidden behind more."""
SLOW_NCCL = 2e9
"""Bytes per second. PCIe 3.0 x16 between two GPUs gives several times that, NVLink a hundred times; what is below goes
through TCP."""
SECONDS_PER_OPERATION = 60
FIX = (
    "NCCL_DEBUG=INFO says which way it takes; NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME on CPUs) chooses the network card"
)


def check_interconnect(context: Context) -> Iterator[Row]:
    """The measured latency and bandwidths, and the judgement of each."""
    config, gpus = context.config, num_gpus()
    world = world_size(config, gpus)
    if world == 1:
        yield Row(CHECK, "ok", "one process: nothing is exchanged")
        return
    assert context.meeting is not None
    on_gpu, folder = uses_gpu(config, gpus), Path(context.meeting.folder)
    settings = {
        "backend": "nccl" if on_gpu else "gloo",
        "all_reduce": SIZES_GPU if on_gpu else SIZES_CPU,
        "all_to_all": negatives_bytes(context.to_build),
        "timeout_s": SECONDS_PER_OPERATION,
        "out": str(folder / "ring.json"),
    }
    environments = ring_environments(context, world)
    outcome = run_children(
        ["blip2train.cli.doctor.ring", json.dumps(settings)],
        environments,
        folder / f"ring-{context.launch.rank}.log",
        context.seconds - 10,
        context.say,
        alarm=folder / "ring-failed",
    )
    if not outcome.good:
        if not outcome.stopped_by_others:
            yield Row(CHECK, "fail", last_words(outcome)[0], FIX)
        return
    if context.launch.is_main:
        exchanged = exchanged_bytes(config, context.facts)
        seconds = None if context.facts.step is None else context.facts.step.seconds
        yield from judge_ring(
            read_json(folder / "ring.json"), exchanged, seconds, on_gpu=on_gpu, sharded=shards_weights(config)
        )


def ring_environments(context: Context, world: int) -> list[dict[str, str]]:
    """One per process that is to be started here: this rank's, or all of them where no launcher has started any."""
    assert context.meeting is not None
    if context.launch.world > 1:
        return [context.meeting.child_environment()]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(context.meeting.port), "WORLD_SIZE": str(world)}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world))
    return [{**os.environ, **meeting, **rank} for rank in ranks]


def exchanged_bytes(config: DictConfig, facts: Facts) -> int | None:
    """Bytes that the strategy moves per step, counted as an all-reduce counts them; None if the model is not known.

    Gradients have the format of what trains, float32 but under a "true" half precision. Where weights are sharded, all
    are gathered for the forward and again for the backward pass, and gradients are scattered: an all-reduce is one
    scatter and one gather, so each counts half.
    """
    if facts.trainable_parameters is None or facts.weight_bytes is None:
        return None
    half = str(config.trainer.get("precision") or "32-true") in {"bf16-true", "16-true"}
    gradients = facts.trainable_parameters * (2 if half else 4)
    return gradients // 2 + facts.weight_bytes if shards_weights(config) else gradients


def negatives_bytes(config: DictConfig) -> int | None:
    """Bytes of image tokens that a rank of stage 1 gets from the others for its negatives; None without any.

    One image per caption of its batch, each a table of tokens in the format that the Q-Former computes in.
    """
    matching = OmegaConf.select(config, "stage.objectives.itm._target_")
    if check.stage_number(config) != 1 or matching is None:
        return None
    from blip2train.cli.meta import build_meta_encoder

    encoder = build_meta_encoder(config)
    size = 2 if "16" in str(config.trainer.get("precision") or "32-true") else 4
    return check.device_batch(config) * encoder.num_tokens * encoder.embed_dim * size


def judge_ring(
    result: Mapping[str, Any], exchanged: int | None, step_seconds: float | None, *, on_gpu: bool, sharded: bool = False
) -> Iterator[Row]:
    """What was measured, and whether a step has to wait for it.

    Args:
        result: of `ring.measure`.
        exchanged: bytes that a step reduces; None if they are not known.
        step_seconds: of a measured step; None if there is none.
        on_gpu: NCCL, not gloo.
        sharded: weights are exchanged, too.
    """
    world = int(result["world_size"])
    factor = 2 * (world - 1) / world  # what every link carries of an all-reduce in a ring
    rates = {int(size): factor * int(size) / seconds for size, seconds in result["all_reduce_s"].items()}
    shown = ", ".join(f"{size // MIB} MiB {rate / 1e9:.2f}" for size, rate in sorted(rates.items()))
    best = rates[max(rates)]
    measured = f"{world} processes: {1e6 * result['latency_s']:,.0f} us latency; GB/s by size: {shown}"
    slow = on_gpu and best < SLOW_NCCL
    yield Row(CHECK, "warn" if slow else "ok", measured + (": the way of TCP" if slow else ""), FIX if slow else "")
    if exchanged is not None:
        seconds = factor * exchanged / best
        what = f"gradients{' and weights' if sharded else ''} of {exchanged / 1e6:,.1f} MB per step"
        yield judge_share(what, seconds, step_seconds, HIDDEN_AT_MOST)
    if result["all_to_all_s"] is not None:
        size, seconds = int(result["all_to_all_bytes"]), float(result["all_to_all_s"])
        # negatives are waited for: nothing else is computed meanwhile
        yield judge_share(f"negatives of {size / 1e6:,.1f} MB per step and rank", seconds, step_seconds, 0.1)


def judge_share(what: str, seconds: float, step_seconds: float | None, at_most: float) -> Row:
    """Seconds of an exchange as a share of a step."""
    measured = f"{what}: {1000 * seconds:,.1f} ms"
    if step_seconds is None:
        return Row(CHECK, "ok", measured)
    share = seconds / step_seconds
    measured += f", {100 * share:.0f} % of a step"
    if share > at_most:
        fix = "a larger batch or trainer.accumulate_grad_batches per exchange; fewer machines, or a faster network"
        return Row(CHECK, "warn", measured, fix)
    return Row(CHECK, "ok", measured)
