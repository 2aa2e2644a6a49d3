"""`blip2train evaluate`: run folder -> the model of its config with its trained weights -> eval/<benchmark>/."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from blip2train.cli import check, processes
from blip2train.cli.config import build, find_user_error, quiet_libraries, register_resolvers, require_filled, run_verb
from blip2train.cli.progress import show_progress
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir

if TYPE_CHECKING:
    import torch
    from torch import nn

    from blip2train.benchmark.base import BenchmarkResult

log = logging.getLogger(__name__)


def main() -> None:
    run_verb("evaluate", run)


def run(config: DictConfig) -> None:
    require_filled(config)
    evaluate(config, RunDir.open(config.run))


def evaluate(config: DictConfig, run: RunDir) -> dict[str, dict[str, float]]:
    """Evaluate a run's checkpoint on benchmarks; writes and returns their metrics by benchmark name.

    Args:
        config: composed from evaluate.yaml. Its benchmarks, or those of the run's own config where it names none.
        run: the run folder; the model is rebuilt from its config.yaml, never from the command line.

    Raises:
        ConfigError: no benchmark, or one that does not fit the run's stage.
        CheckpointError: the run has no fitting checkpoint.
    """
    quiet_libraries()
    whole = merge_with_run(config, load_run_config(run))
    benchmarks = [_build_benchmark(name, part) for name, part in whole.benchmarks.items()]
    _check_stage(whole, benchmarks, run)
    device = choose_device(config.device)
    model = load_model(whole, run, config.checkpoint).to(device)
    results = {}
    for benchmark in benchmarks:
        with show_progress(benchmark.name) as progress:
            result: BenchmarkResult = benchmark.run(model, device, progress)
        metrics = result.metrics | ({"limit": config.limit} if config.limit else {})
        run.write_eval(benchmark.name, metrics, result.predictions, result.images)
        results[benchmark.name] = result.metrics
        log.info("%s: %s", benchmark.name, _headline(result.metrics))
    return results


def merge_with_run(config: DictConfig, trained: DictConfig) -> DictConfig:
    """The run's own config with the benchmarks and roots of an evaluation, which interpolate the model's facts.

    Raises:
        ConfigError: neither names a benchmark.
    """
    given = {name: root for name, root in config.paths.items() if root is not None}
    whole = OmegaConf.merge(trained, {"paths": given})
    assert isinstance(whole, DictConfig)
    if config.benchmarks:
        whole.benchmarks = config.benchmarks
    elif "data" in given:
        for benchmark in whole.benchmarks.values():
            benchmark.urls = [_moved(url, trained.paths.data, given["data"]) for url in benchmark.urls]
    if not whole.benchmarks:
        raise ConfigError("no benchmark chosen", where="benchmark=", fix="for instance benchmark=microworld_retrieval")
    if config.limit:
        for benchmark in whole.benchmarks.values():
            benchmark.limit = config.limit
    return whole


def _moved(url: str, old_root: str, new_root: str) -> str:
    """A run's config is resolved, so its shards name the root they had when it was trained."""
    return new_root + url.removeprefix(old_root) if url.startswith(f"{old_root}/") else url


def load_run_config(run: RunDir) -> DictConfig:
    """The config a run was trained with; its `run_dir` is the folder it was read from, as a run folder may move."""
    register_resolvers()
    config = OmegaConf.load(run.config_path)
    assert isinstance(config, DictConfig)
    config.run_dir = str(run.path)  # parts of a converted model are named below it
    return config


def load_model(config: DictConfig, run: RunDir, checkpoint: str = "last") -> nn.Module:
    """Build the model of a run's config and fill it with the weights of one of its checkpoints."""
    from blip2train.checkpoint.find import find_checkpoint
    from blip2train.checkpoint.io import WEIGHTS, load_weights

    weights = find_checkpoint(run, checkpoint) / WEIGHTS
    model: nn.Module = build(config.model)
    report = load_weights(model, weights)
    log.info("loaded %d trained tensors from %s", len(report.names("checkpoint")), weights.parent)
    return model.eval()


def choose_device(name: str) -> torch.device:
    """`auto` takes the first GPU if there is one; ConfigError if there is no such device."""
    return processes.choose_device(name, 0)


def _build_benchmark(name: str, part: DictConfig) -> Any:
    try:
        return build(part)
    except Exception as error:
        if find_user_error(error) is not None:
            raise
        raise ConfigError(
            f"benchmark {name!r} cannot be built: {str(error).splitlines()[0]}",
            where=f"benchmarks.{name}",
            fix="captioning and VQA need a stage-2 run (a language model), retrieval needs a stage-1 run",
        ) from error


def _check_stage(config: DictConfig, benchmarks: list[Any], run: RunDir) -> None:
    stage = check.stage_number(config)
    for benchmark in benchmarks:
        if benchmark.stage != stage:
            raise ConfigError(
                f"{benchmark.name} evaluates stage-{benchmark.stage} models, {run.path} is a stage-{stage} run",
                where="benchmark=",
                fix="retrieval goes with stage 1, captioning and VQA with stage 2",
            )


def _headline(metrics: dict[str, float]) -> str:
    """The numbers a person looks for first, each followed by what it is to be read against."""
    wanted = (
        *("text_recall@1", "text_recall@1_itm", "image_recall@1", "image_recall@1_itm", "image_recall@1_ceiling"),
        *("vqa_accuracy", "vqa_blind", "vqa_shuffled", "vqa_oracle", "bridging_efficiency"),
        *("caption_cider", "caption_cider_shuffled", "caption_true", "chance"),
    )
    return "  ".join(f"{name} {metrics[name]:.2f}" for name in wanted if name in metrics)


if __name__ == "__main__":
    main()
