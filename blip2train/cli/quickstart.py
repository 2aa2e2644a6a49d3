"""`blip2train quickstart`: micro-world -> shards -> stage 1 -> stage 2 -> benchmarks -> report.html and summary.json.

Nothing here is special to it: each phase is the function behind the verb of that name, called with a composed config.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from blip2train.callback.clock import format_seconds
from blip2train.cli import microworld
from blip2train.cli.config import compose, run_verb
from blip2train.cli.evaluate import evaluate
from blip2train.cli.train import train
from blip2train.errors import ConfigError, DataError
from blip2train.exit_code import REQUEUE
from blip2train.run_dir import RunDir, read_json, write_json

log = logging.getLogger(__name__)

MARKER = "quickstart.json"
"""Settings of the quickstart that a folder belongs to; what lacks it is not ours to delete."""

STAGE2_EXPERIMENTS = {"tiny_opt": "microworld_stage2_opt", "tiny_t5": "microworld_stage2_t5"}


class Phases:
    """Wall seconds of each phase, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        log.info("== %s", name)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        log.info("== %s took %s", name, format_seconds(self.seconds[name]))


def main() -> None:
    run_verb("quickstart", run)


def run(config: DictConfig) -> None:
    """The whole path; raises `ConfigError` before any work where a choice does not exist."""
    for key, known in (("limit", config.sizes), ("language_model", STAGE2_EXPERIMENTS)):
        if config[key] not in known:
            raise ConfigError(f"{key} is {config[key]!r}", where=key, fix=f"one of {', '.join(map(str, known))}")
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        config.out = f"{config.out}/{HydraConfig.get().job.num}"  # a sweep: one folder per job
    started = time.perf_counter()
    phases, out = Phases(), Path(config.out)
    stage1, stage2 = RunDir(out / "stage1"), RunDir(out / "stage2")
    _make_room(config, out)
    with phases.time("import libraries"):
        import pytorch_lightning  # noqa: F401
        import transformers  # noqa: F401
    with phases.time("data: scenes and shards"):
        _build_data(config, out)
    with phases.time("stage 1: ITC + ITM + ITG"):
        _train(config, "microworld_stage1", stage1, config.stage1.overrides)
    with phases.time("evaluate stage 1: retrieval"):
        _evaluate(stage1)
    with phases.time(f"stage 2: soft prompts into the frozen {config.language_model}"):
        start = "scratch" if config.stage2.from_scratch else str(stage1.path)
        overrides = [f"init_from={start}", *config.stage2.overrides]
        _train(config, STAGE2_EXPERIMENTS[config.language_model], stage2, overrides)
    with phases.time("evaluate stage 2: captions and questions"):
        _evaluate(stage2)
    _report(stage1, stage2, out, phases, started)


def _make_room(config: DictConfig, out: Path) -> None:
    """Start afresh over an earlier quickstart, continue an interrupted one with the same settings, touch nothing else.

    Raises:
        ConfigError: the folder holds runs that no quickstart made.
    """
    marker, wanted = out / MARKER, OmegaConf.to_container(config, resolve=True)
    mine = [out / name for name in ("stage1", "stage2", "data", "summary.json", "report.html")]
    if not marker.is_file() and any(path.exists() for path in mine):
        raise ConfigError(
            f"{out} holds something that no quickstart made",
            where="out=",
            fix="give another out=, or clear that folder",
        )
    if marker.is_file() and read_json(marker) == wanted and not (out / "summary.json").is_file():
        log.info("continuing the interrupted quickstart in %s", out)
        return
    for run in ("stage1", "stage2"):
        shutil.rmtree(out / run, ignore_errors=True)
    (out / "summary.json").unlink(missing_ok=True)
    write_json(marker, wanted)  # type: ignore[arg-type]


def _build_data(config: DictConfig, out: Path) -> None:
    from blip2train.microworld.pack import MANIFEST

    size = config.sizes[config.limit]
    world = [f"world.{key}={value}" for key, value in config.world.items()]
    counts = [f"train_images={size.train_images}", f"val_images={size.val_images}"]
    wanted = compose("microworld_build", [f"paths.data={out}/data", f"world.seed={config.seed}", *counts, *world])
    try:
        microworld.build(wanted)
    except DataError:  # an earlier quickstart with another seed, size or world; as its runs, its data makes room
        if not (Path(wanted.out) / MANIFEST).is_file():
            raise
        shutil.rmtree(wanted.out)
        microworld.build(wanted)


def _train(config: DictConfig, experiment: str, run: RunDir, overrides: list[str]) -> None:
    size = config.sizes[config.limit]
    steps = size.stage1_steps if experiment == "microworld_stage1" else size.stage2_steps
    own = [
        f"experiment={experiment}",
        f"seed={config.seed}",
        f"paths.data={config.out}/data",
        f"run_dir={run.path}",
        f"num_threads={config.num_threads or 'null'}",
        f"trainer.max_steps={steps}",
        f"optim.warmup_steps={min(60, steps // 4)}",
    ]
    outcome = train(compose("train", own + list(overrides)), run)
    if outcome.exit_code == REQUEUE:
        raise SystemExit(REQUEUE)
    if outcome.stopped_by:
        raise KeyboardInterrupt


def _evaluate(run: RunDir) -> None:
    evaluate(compose("evaluate", [f"run={run.path}"]), run)


def _report(stage1: RunDir, stage2: RunDir, out: Path, phases: Phases, started: float) -> None:
    from blip2train.report.html import build_report
    from blip2train.report.summary import write_summary

    with phases.time("report"):
        title = "BLIP-2 on the micro-world"
        page = build_report([stage1, stage2], out, title, phases=phases.seconds)
    summary = write_summary(stage1, stage2, out, time.perf_counter() - started, phases.seconds)
    log.info("\n%s", phase_table(phases.seconds))
    log.info("report:  %s\nsummary: %s", page, summary)


def phase_table(seconds: dict[str, float]) -> str:
    """One line per phase and their sum."""
    rows = [*seconds.items(), ("all", sum(seconds.values()))]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value:7.1f} s" for name, value in rows)


if __name__ == "__main__":
    main()
