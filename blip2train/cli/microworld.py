"""`blip2train microworld build|pretrain`: the embedded world's data, and the tiny frozen backbones shipped with it."""

from __future__ import annotations

import json
import logging
import shlex
import sys

from omegaconf import DictConfig

from blip2train.cli.config import build as build_object
from blip2train.cli.config import quiet_libraries, require_filled, run_verb
from blip2train.cli.evaluate import show_progress

log = logging.getLogger(__name__)

USAGE = """usage: blip2train microworld build [out=data/microworld] [world.noise=20 ...]
       blip2train microworld pretrain part=vit|opt|t5 [out=...]

build     renders scenes and packs them into WebDataset shards: train, val_in, val_out (held-out shape-colour pairs)
pretrain  re-makes a tiny frozen backbone from nothing (minutes to an hour of CPU); the package ships them made"""


def main() -> None:
    verbs = {"build": ("microworld_build", build), "pretrain": ("microworld_pretrain", pretrain)}
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in verbs:
        (sys.stdout if name in {"-h", "--help"} else sys.stderr).write(USAGE + "\n")
        raise SystemExit(0 if name in {"-h", "--help"} else 2)
    del sys.argv[1]
    run_verb(*verbs[name])


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
    """One frozen backbone from nothing; interrupt it at will, the same command continues."""
    require_filled(config)
    quiet_libraries()
    import torch

    from blip2train.microworld import backbone

    torch.set_num_threads(config.num_threads)
    with show_progress(f"pretrain {config.part}") as progress:
        entry = backbone.pretrain(
            config.part,
            build_object(config.world),
            config.out,
            steps=config.steps,
            seed=config.seed,
            bfloat16=config.bfloat16,
            command=shlex.join(["blip2train", "microworld", "pretrain", *sys.argv[1:]]),
            progress=lambda done, total, loss: progress(done, total),
        )
    log.info("%s: %s", config.part, json.dumps(entry.get("scores", {})))


if __name__ == "__main__":
    main()
