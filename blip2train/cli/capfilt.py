"""`blip2train capfilt`: captions written by a model and ranked with those of the web -> new shards with the best."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from blip2train.cli.config import quiet_libraries, require_filled, run_verb
from blip2train.cli.processes import children, choose_device, count_children
from blip2train.cli.progress import show_progress
from blip2train.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from blip2train.capfilt.captioner import Captioner, CaptionSettings
    from blip2train.capfilt.job import Job
    from blip2train.capfilt.ranker import Ranker
    from blip2train.capfilt.shard import ShardSettings
    from blip2train.cli.progress import ShowProgress
    from blip2train.data.shards import Shard, ShardCache

log = logging.getLogger(__name__)

T = TypeVar("T")

_SECONDS_BETWEEN_LOOKS = 2.0

_KINDS: dict[str, tuple[type, ...]] = {
    "urls": (str, list),
    "out": (str,),
    "index": (str, type(None)),
    "storage_options": (dict,),
    "cache": (dict,),
    "cache.folder": (str, type(None)),
    "cache.max_gb": (float,),
    "captioner": (dict,),
    "captioner.model": (str,),
    "captioner.checkpoint": (str,),
    "captioner.dtype": (str,),
    "captioner.settings": (dict,),
    "ranker": (dict,),
    "ranker.model": (str,),
    "ranker.dtype": (str,),
    "rule": (dict,),
    "max_dropped_share": (float,),
    "device": (str, int),
}
"""What the values are that no dataclass takes; above what lies in them."""


def main() -> None:
    run_verb("capfilt", run)


def run(config: DictConfig) -> None:
    require_filled(config)
    quiet_libraries()
    capfilt(config)


def capfilt(config: DictConfig) -> dict[str, Any] | None:
    """Do this process's part, and the rest of it where no other process takes it.

    Returns:
        The manifest, if this call was the one that finished the job.

    Raises:
        ConfigError: a setting or model that cannot be used.
        DataError: shards that cannot be used, or a folder that holds something else.
    """
    from blip2train.capfilt.candidate import KeepRule
    from blip2train.capfilt.captioner import CaptionSettings
    from blip2train.capfilt.finish import finish
    from blip2train.capfilt.shard import ShardSettings
    from blip2train.distributed import launched_as
    from blip2train.report.capfilt import write_page

    check_kinds(config)
    writing = _settings(CaptionSettings, config.captioner.settings, "captioner.settings")
    rule = _settings(KeepRule, config.rule, "rule")
    settings = ShardSettings(rule, config.store_all, config.batch_size, config.keep_unusable)
    rank, world, local_rank = launched_as()
    device = choose_device(config.device, local_rank)
    job = open_job(config, writing, settings, device)
    if not job.is_done():
        num_children = count_children(config.num_processes, world, config.device)
        with children("blip2train.cli.capfilt", num_children):
            share = (rank, max(world, num_children + 1))
            work(config, job, writing, settings, device, share)
    if not job.is_done():
        log.info("%s: the other processes are still at work; the last one writes the report", job.out)
        return None
    manifest = finish(job, config.max_dropped_share)
    page = write_page(job.out)
    log.info(
        "%s: %s captions for %s images in %d shards; see %s",
        job.out, f"{manifest['num_captions']:,}", f"{manifest['num_records']:,}", len(manifest["shards"]),
        page,
    )  # fmt: skip
    return manifest


def check_kinds(config: DictConfig) -> None:
    """ConfigError if a value is of another kind than it must be."""
    from blip2train.capfilt.setting import check_type

    for key, kinds in _KINDS.items():
        value = OmegaConf.select(config, key)
        check_type(OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value, kinds, key)
    if not 0 <= config.max_dropped_share <= 1:
        raise ConfigError(
            f"max_dropped_share={config.max_dropped_share}", where="max_dropped_share", fix="give a share from 0 to 1"
        )


def _settings(kind: type[T], node: DictConfig, where: str) -> T:
    """A dataclass of its settings; ConfigError if one of them is none of its."""
    values: Any = OmegaConf.to_container(node, resolve=True)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        raise ConfigError(f"no setting {', '.join(unknown)}", where=where, fix=f"it has {', '.join(known)}")
    return kind(**values)


def open_job(config: DictConfig, writing: CaptionSettings, settings: ShardSettings, device: torch.device) -> Job:
    """The job of a config, with its folder made ready."""
    from blip2train.capfilt.job import Job
    from blip2train.capfilt.loading import model_identity
    from blip2train.capfilt.ranker_open_clip import PREFIX, weights_path
    from blip2train.data.shards import open_shards

    urls = config.urls if isinstance(config.urls, str) else list(config.urls)
    captioner, ranker = config.captioner, config.ranker
    run_weights = _run_weights(captioner.model, captioner.checkpoint)
    if run_weights is None:
        captions = model_identity(captioner.model, captioner.dtype, device, "captioner.dtype")
    else:
        captions = _run_identity(captioner.model, run_weights)
    identity = {
        "captioner": captions | asdict(writing),
        "ranker": model_identity(
            ranker.model,
            ranker.dtype,
            device,
            "ranker.dtype",
            weights_path(ranker.model) if ranker.model.startswith(PREFIX) else None,
        ),
        "shards": asdict(settings),
    }
    job = Job(open_shards(urls, open_cache(config), config.index), config.out, identity)
    job.prepare()
    return job


def open_cache(config: DictConfig) -> ShardCache:
    """Where remote shards are put to be read."""
    from blip2train.data.shards import ShardCache

    options: Any = OmegaConf.to_container(config.storage_options)
    return ShardCache(**OmegaConf.to_container(config.cache), storage_options=options)  # type: ignore[arg-type]


def work(
    config: DictConfig,
    job: Job,
    writing: CaptionSettings,
    settings: ShardSettings,
    device: torch.device,
    share: tuple[int, int],
) -> None:
    """Load the models and do shards until none is free."""
    import torch

    from blip2train.capfilt.finish import new_ledger
    from blip2train.capfilt.item import DATASET
    from blip2train.capfilt.shard import ShardResult, process_shard

    captioner = load_captioner(config, writing, device)
    ranker = load_ranker(config, device)
    ledger = new_ledger(job, config.max_dropped_share)
    rank, world = share
    cache = open_cache(config)

    def prefetch(shard: Shard) -> None:
        cache.prefetch([shard])

    def process(shard: Shard, out: Path, progress: Any) -> ShardResult:
        try:
            result = process_shard(shard, out, captioner, ranker, settings, progress, cache)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{device} has too little memory ({str(error).splitlines()[0]})",
                where=f"batch_size={settings.batch_size}, num_captions={writing.num_captions}",
                fix="lower batch_size (and begin in a new folder: it decides which images share a batch)",
            ) from error
        ledger.add({DATASET: result.num_read}, result.drops)
        return result

    if rank:
        job.work(process, rank, world, lambda: None, prefetch)
        return
    with show_progress("capfilt") as show:
        show(job.num_read(), job.num_records)
        job.work(process, rank, world, _looking(job, show), prefetch)
        show(job.num_read(), job.num_records)


def load_captioner(config: DictConfig, writing: CaptionSettings, device: torch.device) -> Captioner:
    """A run folder of ours, or a model of transformers."""
    if _run_weights(config.captioner.model, config.captioner.checkpoint) is None:
        from blip2train.capfilt.captioner_transformers import TransformersCaptioner

        return TransformersCaptioner(config.captioner.model, writing, device, config.captioner.dtype)
    return _load_run(config.captioner, writing, device)


def load_ranker(config: DictConfig, device: torch.device) -> Ranker:
    """A model of open_clip where the name says so, else of transformers."""
    from blip2train.capfilt.ranker_open_clip import PREFIX, OpenClipRanker
    from blip2train.capfilt.ranker_transformers import TransformersRanker

    kind = OpenClipRanker if config.ranker.model.startswith(PREFIX) else TransformersRanker
    return kind(config.ranker.model, device, config.ranker.dtype)


def _looking(job: Job, show: ShowProgress) -> Any:
    """Shows what all processes have done; not more often than every few seconds, for it looks at their files."""
    last = 0.0

    def look() -> None:
        nonlocal last
        before = time.monotonic()
        if before >= last:
            show(job.num_read(), job.num_records)
            now = time.monotonic()
            last = now + max(_SECONDS_BETWEEN_LOOKS, 20 * (now - before))

    return look


def _run_weights(model: str, checkpoint: str) -> Path | None:
    """The weights of a run folder's checkpoint; None for any other model."""
    from blip2train.checkpoint.find import find_checkpoint
    from blip2train.checkpoint.io import WEIGHTS
    from blip2train.run_dir import RunDir

    run = RunDir(Path(model).expanduser())
    return find_checkpoint(run, checkpoint) / WEIGHTS if run.config_path.is_file() else None


def _run_identity(model: str, weights: Path) -> dict[str, Any]:
    from blip2train.capfilt.loading import weights_digest

    return {"model": model, "checkpoint": weights.parent.name, "weights": weights_digest(weights)}


def _load_run(captioner: DictConfig, writing: CaptionSettings, device: torch.device) -> Captioner:
    from dataclasses import replace

    from blip2train.capfilt.captioner_run import Stage1Captioner, Stage2Captioner
    from blip2train.cli.check import stage_number
    from blip2train.cli.config import build
    from blip2train.cli.evaluate import load_model, load_run_config
    from blip2train.data.image_transform import EvalTransform
    from blip2train.run_dir import RunDir

    run = RunDir.open(Path(captioner.model).expanduser(), "captioner.model")
    config = load_run_config(run)
    model: Any = load_model(config, run, captioner.checkpoint).to(device)
    transform = EvalTransform(build(config.model.vision_encoder.image))
    if stage_number(config) == 1:
        tokenizer = build(config.tokenizer)
        return Stage1Captioner(model, tokenizer, transform, replace(writing, prompt=writing.prompt or ""), device)
    prompt = OmegaConf.select(config, "llm.caption_prompt") if writing.prompt is None else writing.prompt
    tokenizer = build(config.llm.tokenizer)
    return Stage2Captioner(model, tokenizer, transform, replace(writing, prompt=prompt or ""), device)


if __name__ == "__main__":
    main()
