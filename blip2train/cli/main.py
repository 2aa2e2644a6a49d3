"""The dispatcher: `blip2train VERB [overrides]` becomes `python -m blip2train.cli.VERB [overrides]`.

It imports nothing heavy, so `--help` is instant, and it replaces its own process: Lightning's DDP launcher re-executes
the running module for ranks > 0, and a dispatcher that stayed in between would lose the verb there.
"""

from __future__ import annotations

import difflib
import os
import sys

VERBS = {
    "quickstart": "everything on the embedded micro-world: data, both stages, evaluation, report",
    "doctor": "before a long run: machine, data, weights, disk and one step of it:  doctor [as for train]",
    "train": "train stage 1 or stage 2:  train experiment=microworld_stage1",
    "evaluate": "evaluate a run's checkpoint:  evaluate run=outputs/... benchmark=microworld_vqa",
    "report": "one HTML page from run folders:  report 'runs=[outputs/a,outputs/b]'",
    "convert": "LAVIS's and transformers' weights in and out:  convert from=lavis to=blip2train source=...",
    "show": "look inside:  show batch | order | masks | params | estimate | config | paper-diff  [as for train]",
    "data": "shards: make, check and look at them: data pack input=FOLDER out=SHARDS; `data --help` lists all",
    "capfilt": "caption images by a model, keep the best by CLIP:  capfilt urls=SHARDS out=NEW_SHARDS",
    "microworld": "the embedded world:  microworld build | microworld pretrain part=opt",
}


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return f"""usage: blip2train VERB [overrides]

{verbs}

Every verb takes Hydra overrides (key=value, group=option), --help, --cfg job (print the config and stop) and, where it
makes sense, -m for a sweep. The configs lie in configs/ (in an installed package: blip2train/configs/)."""


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        sys.stdout.write(usage() + "\n")
        return
    verb, *rest = arguments
    if verb == "--version":
        from blip2train import __version__

        sys.stdout.write(f"blip2train {__version__}\n")
        return
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        sys.stderr.write(f"blip2train: unknown verb {verb!r}{hint}\n\n{usage()}\n")
        raise SystemExit(2)
    os.execv(sys.executable, [sys.executable, "-m", f"blip2train.cli.{verb}", *rest])


if __name__ == "__main__":
    main()
