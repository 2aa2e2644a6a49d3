"""Check "disk": room for the run's checkpoints, and whether writing, flushing and renaming work there, and how fast."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from blip2train.cli.doctor.context import Context
from blip2train.cli.doctor.row import Row
from blip2train.data.remote import is_remote
from blip2train.run_dir import free_bytes

CHECK = "disk"
PROBE_BYTES = 256 << 20
"""Written at most: beyond the caches of a controller, and a second or two on a slow disk."""
SECONDS_TO_WRITE = 60.0
"""A checkpoint that takes longer stops all devices for as long."""
INODES_AT_LEAST = 10_000
_CHUNK = 8 << 20
_LOGGER_FOLDERS = {"folder", "save_dir", "run_dir", "dir"}
"""Names that the arguments of loggers have for where they write."""


def check_disk(context: Context) -> Iterator[Row]:
    """Room, a trial file, and the folders of loggers and of the shard cache."""
    config = context.config
    facts = context.facts
    facts.trainable_parameters, facts.weight_bytes = count_weights(context.to_build)
    one, all_kept = checkpoint_bytes(config, facts.trainable_parameters)
    facts.checkpoint_bytes = one
    yield judge_room(context.run_dir, free_bytes(context.run_dir), one, all_kept)
    folder = existing_parent(context.run_dir)
    inodes = os.statvfs(folder)
    if inodes.f_files and inodes.f_favail < INODES_AT_LEAST:
        fix = "delete small files there, or choose another run_dir="
        yield Row(CHECK, "warn", f"{inodes.f_favail} files more can be made on the disk of {folder}", fix)
    try:
        rate = try_to_write(folder, min(PROBE_BYTES, max(one, 1 << 20)))
    except OSError as error:
        yield Row(
            CHECK, "fail", f"a trial file in {folder}: {error.strerror}", "free space or quota, or another run_dir="
        )
        return
    facts.write_bytes_per_s = rate
    yield judge_rate(one, rate)
    for name, path in other_folders(config).items():
        yield judge_folder(name, path)


def count_weights(config: DictConfig) -> tuple[int, int]:
    """(trainable parameters, bytes of all weights) of the model of a config, which is built without memory."""
    from blip2train.cli.meta import build_meta
    from blip2train.model.freezing import count_parameters

    model = build_meta(config)
    return count_parameters(model)[0], sum(item.numel() * item.element_size() for item in model.parameters())


def checkpoint_bytes(config: DictConfig, trainable: int) -> tuple[int, int]:
    """(of one checkpoint, of all that lie there at the same time)."""
    from blip2train.callback.checkpoint import estimated_bytes

    with_state = bool(config.checkpoint.get("trainer_state", True))
    every = estimated_bytes(trainable, int(config.checkpoint.get("keep_last", 1)), with_state)
    return trainable * 4 * (3 if with_state else 1), every


def judge_room(run_dir: Path, free: int, one: int, all_kept: int) -> Row:
    """Free space against the checkpoints that are kept and the one that is being written."""
    measured = (
        f"{free / 1e9:,.1f} GB free for {run_dir}; checkpoints of {one / 1e9:.2f} GB, {all_kept / 1e9:.2f} GB at once"
    )
    fix = "free some space, or set another run_dir=, or checkpoint.keep_last=1"
    if free < all_kept:
        return Row(CHECK, "fail", measured, fix)
    if free < 2 * all_kept:
        return Row(CHECK, "warn", measured, f"{fix}: logs and others need room, too")
    return Row(CHECK, "ok", measured)


def existing_parent(path: Path) -> Path:
    """The folder that `path` is or will be made in."""
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def try_to_write(folder: Path, size: int) -> float:
    """Write and flush a file as a checkpoint is written, rename it, and its folder; bytes per second.

    Raises:
        OSError: any of it failed; nothing is left behind.
    """
    place = Path(tempfile.mkdtemp(prefix=".doctor-", dir=folder))
    try:
        inside = place / "partial"
        inside.mkdir()
        chunk = os.urandom(min(size, _CHUNK))  # some filesystems compress, and zeros would fly
        start = time.perf_counter()
        with (inside / "trial.partial").open("wb") as file:
            for begin in range(0, size, len(chunk)):
                file.write(chunk[: size - begin])
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        (inside / "trial.partial").rename(inside / "trial")
        inside.rename(place / "whole")
        if (place / "whole" / "trial").stat().st_size != size:
            raise OSError(0, "the trial file is shorter than what was written")
        return size / max(seconds, 1e-9)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def judge_rate(one: int, rate: float) -> Row:
    """Seconds that a checkpoint stops the training for."""
    seconds = one / rate
    measured = f"written and flushed at {rate / 1e6:,.0f} MB/s: {seconds:,.1f} s per checkpoint; renaming works"
    if seconds > SECONDS_TO_WRITE:
        return Row(CHECK, "warn", measured, "a faster disk for run_dir=, or checkpoints less often (checkpoint.*)")
    return Row(CHECK, "ok", measured)


def other_folders(config: DictConfig) -> dict[str, Path]:
    """Folders outside the run's that loggers and the cache of remote shards write to, by their setting."""
    folders: dict[str, Path] = {}
    run_dir = Path(str(config.run_dir)).absolute()
    loggers: Mapping[str, Any] = config.get("logger") or {}
    for name, logger in loggers.items():
        for key in _LOGGER_FOLDERS & set(logger):
            path = Path(str(logger[key])).absolute()
            if path != run_dir and run_dir not in path.parents:
                folders[f"logger.{name}.{key}"] = path
    datasets = config.data.datasets.values() if config.data else ()
    urls: Any = [
        OmegaConf.to_container(item.urls) if OmegaConf.is_list(item.urls) else [item.urls] for item in datasets
    ]
    if any(is_remote(str(url)) for group in urls for url in group):
        folders["data.cache.folder"] = _cache_folder(config)
    return folders


def _cache_folder(config: DictConfig) -> Path:
    from blip2train.data.shards import ShardCache

    return ShardCache(folder=config.data.cache.get("folder")).folder.absolute()


def judge_folder(name: str, path: Path) -> Row:
    """A folder beside the run's: it can be written to."""
    folder = existing_parent(path)
    if not os.access(folder, os.W_OK | os.X_OK):
        return Row(CHECK, "fail", f"{name}: {path} cannot be written", f"{name}= a folder that you may write to")
    return Row(CHECK, "ok", f"{name}: {path} can be written, {free_bytes(path) / 1e9:,.1f} GB free")
