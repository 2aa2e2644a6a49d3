"""`blip2train data VERB`: the tools around shards. This file only finds them; each lies in `data_<verb>.py`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from omegaconf import DictConfig

from blip2train.cli.config import run_subverb

VERBS = {
    "pack": "images with captions or questions -> shards      input=FOLDER out=SHARDS [source=coco ...]",
    "index": "shards of anyone -> how many records they hold  'urls=[SHARDS/*.tar]'",
    "check": "shards -> what is in them, and what is wrong     'urls=[SHARDS/*.tar]'",
    "view": "shards -> a page of pictures and histograms      'urls=[SHARDS/*.tar]' out=view.html",
    "cache-features": "shards -> the frozen encoder's output, once      experiment=NAME out=FOLDER",
}
"""Name -> one line of help. `data pack` is configs/data_pack.yaml and the function `run` of cli/data_pack.py."""


def main() -> None:
    run_subverb(usage(), {verb: (_module(verb), _runner(verb)) for verb in VERBS})


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return f"""usage: blip2train data VERB [overrides]

{verbs}

`blip2train data VERB --help` lists every setting."""


def _module(verb: str) -> str:
    return f"data_{verb.replace('-', '_')}"


def _runner(verb: str) -> Callable[[DictConfig], None]:
    def run(config: DictConfig) -> None:
        importlib.import_module(f"blip2train.cli.{_module(verb)}").run(config)

    return run


if __name__ == "__main__":
    main()
