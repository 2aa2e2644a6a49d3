"""`blip2train microworld build|pretrain`: the embedded world's data, and the tiny frozen backbones shipped with it."""

from __future__ import annotations

import functools
import json
import logging
import shlex
import sys
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from blip2train.cli.config import build as build_object
from blip2train.cli.config import quiet_libraries, require_filled, run_subverb
from blip2train.cli.progress import show_progress

if TYPE_CHECKING:
    from blip2train.benchmark.base import Progress

log = logging.getLogger(__name__)

USAGE = """usage: blip2train microworld build [out=data/microworld] [world.noise=20 ...]
       blip2train microworld pretrain [part=vit|opt|t5|qformer_tokenizer] [out=...]

build     renders scenes and packs them into WebDataset shards: train, val_in, val_out (held-out shape-colour pairs)
pretrain  re-makes the tiny frozen backbones from nothing (minutes to an hour of CPU each); the package ships them"""


def main() -> None:
    verbs = {"build": ("microworld_build", build), "pretrain": ("microworld_pretrain", pretrain)}
    run_subverb(USAGE, verbs)


def build(config: DictConfig) -> None:
    """Scenes -> shards; a finished folder of the same world is reused."""
    require_filled(config)
    from blip2train.microworld.pack import build_world

    with show_progress("micro-world") as progress:
        manifest = build_world(
            build_object(config.world), config.out, config.train_images, config.val_images, progress=progress
        )
    log.info("micro-world in %s: %s (world %s)", config.out, manifest["images"], manifest["world_hash"][:12])


def pretrain(config: DictConfig) -> None:
    """Frozen backbones from nothing; interrupt it at will, the same command continues."""
    require_filled(config)
    quiet_libraries()
    import torch

    from blip2train.microworld import backbone

    torch.set_num_threads(config.num_threads)
    command = shlex.join(["blip2train", "microworld", "pretrain", *sys.argv[1:]])
    for part in backbone.PARTS if config.part == "all" else [config.part]:
        with show_progress(f"pretrain {part}") as progress:
            entry = backbone.pretrain(
                part,
                build_object(config.world),
                config.out,
                steps=config.steps,
                seed=config.seed,
                bfloat16=config.bfloat16,
                command=command,
                progress=functools.partial(_advance, progress),
            )
        log.info("%s: %s", part, json.dumps(entry.get("scores", {})))


def _advance(progress: Progress, done: int, total: int, loss: float) -> None:
    """A bar needs no loss; the training logs it."""
    progress(done, total)


if __name__ == "__main__":
    main()
