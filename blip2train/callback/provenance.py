"""Where a run came from: versions, git commit, seed, shard hashes and the exact command, as manifest.json.

Written once the model stands and its weights are loaded: a start that fails leaves no folder that looks like a run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

PACKAGES = (
    "torch",
    "torchvision",
    "pytorch-lightning",
    "transformers",
    "timm",
    "webdataset",
    "hydra-core",
    "deepspeed",
)


class ProvenanceCallback(pl.Callback):
    """Calls `write` once, on the main process, before the first step and after everything that can refuse the start."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._write()


def describe_run(*, seed: int, command: Sequence[str], shards: Sequence[str]) -> dict[str, Any]:
    """Facts that make a run repeatable; unknown ones are null, never guessed."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(command),
        "seed": seed,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in ("blip2train", *PACKAGES)},
        "shards": len(shards),
        "shard_list_sha256": hash_shards(shards),
    }


def hash_shards(shards: Sequence[str]) -> str:
    """Hash of the shards' names and sizes: cheap at any scale, and changes whenever a local shard does."""
    lines = [f"{Path(url).name}:{Path(url).stat().st_size if Path(url).is_file() else 'remote'}" for url in shards]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git in the checkout this package lies in; None outside one."""
    root = Path(sys.modules["blip2train"].__path__[0]).parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(("git", "-C", str(root), *arguments), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
