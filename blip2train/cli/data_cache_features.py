"""`blip2train data cache-features`: the datasets and the frozen encoder of an experiment -> shards of image tokens."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from blip2train import distributed
from blip2train.cli.check_model import check_precision
from blip2train.cli.config import build, quiet_libraries, require_filled
from blip2train.cli.features import check_frozen, computing_formats, encoder_facts
from blip2train.cli.processes import choose_device
from blip2train.cli.progress import ShowProgress, show_progress
from blip2train.cli.train import adopt_vision_encoder, check_shipped_backbones
from blip2train.errors import ConfigError, DataError
from blip2train.run_dir import free_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from blip2train.data.feature_cache import FeatureFacts, FinishedShard
    from blip2train.data.feature_writer import Encode
    from blip2train.data.shards import ShardReader

log = logging.getLogger(__name__)

_OTHER_BYTES_PER_RECORD = 3 * 1024
"""Two headers in the tar, the captions, and what fills the blocks up."""
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a cache is made of, and what of it is there: readers of the sources, and finished shards, by dataset."""

    sources: dict[str, ShardReader]
    finished: dict[str, list[FinishedShard | None]]

    def records_to_do(self, rank: int = 0, world_size: int = 1) -> int:
        return sum(
            shard.num_records
            for name, reader in self.sources.items()
            for index, shard in enumerate(reader.shards)
            if index % world_size == rank and self.finished[name][index] is None
        )


def run(config: DictConfig) -> None:
    """Run the encoder over every dataset of the mixture, once; continues where an interrupted call stopped."""
    _check(config)
    from blip2train.data.drop import DropLedger
    from blip2train.data.feature_cache import claim_folder, note_sources
    from blip2train.data.feature_writer import FeatureWriter
    from blip2train.data.image_transform import EvalTransform

    quiet_libraries()
    rank, world_size, local_rank = distributed.launched_as()
    out = Path(config.out)
    plan = _plan(config, out)
    if rank == 0:
        _report_size(config, plan, out)
    device = choose_device(f"cuda:{local_rank}" if config.device == "cuda" else config.device, local_rank)
    encoder = _build_encoder(config, device)
    claim_folder(out, _facts(config, encoder))
    for dataset in config.data.datasets.values():
        note_sources(out / dataset.name, dataset.urls)
    writer = FeatureWriter(
        EvalTransform(encoder.image),  # type: ignore[arg-type]
        _encode(encoder, config, device),
        batch_size=config.encode_batch,
        num_threads=max(1, config.data.num_workers),
        ledger=DropLedger(list(plan.sources), config.data.max_dropped_share),
        max_pixels=config.data.max_pixels,
    )
    whole = {}
    with show_progress("encoding") as progress:
        count = _Count(progress, plan.records_to_do(rank, world_size))
        for name, reader in plan.sources.items():
            whole[name] = writer.write(name, reader, out / name, rank=rank, world_size=world_size, progress=count.add)
    if all(whole.values()):
        _report_outcome(_read_notes(plan.sources, out), out)
    else:
        log.info("process %d of %d is done; the last one to end completes %s", rank + 1, world_size, out)


class _Count:
    """What this process has done, for the progress bar."""

    def __init__(self, progress: ShowProgress, total: int) -> None:
        self._progress, self._total = progress, total
        self._records = self._bytes = 0
        progress(0, total, 0)

    def add(self, records: int, num_bytes: int) -> None:
        self._records += records
        self._bytes += num_bytes
        self._progress(self._records, self._total, self._bytes)


def _check(config: DictConfig) -> None:
    """Whatever can be refused before anything is read."""
    from blip2train.model.vision_encoder.token_codec import token_codec

    require_filled(config)
    if not config.get("model") or not config.get("data"):
        raise ConfigError("no model or no data chosen", where="experiment=", fix="choose an experiment")
    if config.get("features"):
        raise ConfigError("features is for train", where="features", fix="give out= alone: the cache to be made")
    if config.encode_batch < 1:
        raise ConfigError(f"encode_batch is {config.encode_batch}", where="encode_batch", fix="give 1 or more images")
    token_codec(config.codec)
    check_precision(config)
    adopt_vision_encoder(config)
    check_frozen(config)
    encoder_facts(config)


def _plan(config: DictConfig, out: Path) -> _Plan:
    from blip2train.data.shards import ShardCache, ShardReader, open_shards

    cache = build(config.data.cache) or ShardCache()
    sources = {}
    for dataset in map(build, config.data.datasets.values()):
        of_dataset = cache.with_options(dataset.storage_options)
        sources[dataset.name] = ShardReader(open_shards(dataset.urls, of_dataset, dataset.index), of_dataset)
    if not sources:
        raise ConfigError("the mixture has no datasets", where="data.datasets", fix="choose an experiment with data")
    check_shipped_backbones(config, [shard.url for reader in sources.values() for shard in reader.shards])
    return _Plan(sources, _read_notes(sources, out))


def _read_notes(sources: dict[str, ShardReader], out: Path) -> dict[str, list[FinishedShard | None]]:
    """By dataset, what is finished of its shards."""
    from blip2train.data.feature_cache import read_finished

    return {
        name: [read_finished(out / name, index, shard) for index, shard in enumerate(reader.shards)]
        for name, reader in sources.items()
    }


def _report_size(config: DictConfig, plan: _Plan, out: Path) -> None:
    """Say what is about to be written; DataError if the disk cannot take it."""
    from blip2train.cli.meta import build_meta_encoder
    from blip2train.model.vision_encoder.token_codec import CODECS, bytes_per_token

    encoder = build_meta_encoder(config)
    per_image = encoder.num_tokens * bytes_per_token(CODECS[config.codec], encoder.embed_dim)
    per_record = per_image + _OTHER_BYTES_PER_RECORD
    table = Table("dataset", "shards", "records", "size", title=f"{out}: features as {config.codec}")
    for name, reader in plan.sources.items():
        records = sum(shard.num_records for shard in reader.shards)
        table.add_row(name, f"{len(reader.shards):,}", f"{records:,}", _size(records * per_record))
    console = Console()
    console.print(table)
    needed, free = plan.records_to_do() * per_record, free_bytes(out)
    console.print(
        f"{encoder.num_tokens} tokens of width {encoder.embed_dim}: {per_image:,} bytes per image; "
        f"to be written now: {_size(needed)} of {_size(free)} free",
        highlight=False,
    )
    if needed + _SPARE_BYTES > free:
        raise DataError(
            f"not enough disk space: about {_size(needed)} needed, {_size(free)} free",
            where=str(out),
            fix="choose another folder, free space, or store 8 bits per value: codec=float8 or int8",
        )


def _build_encoder(config: DictConfig, device: torch.device) -> nn.Module:
    """The encoder with its weights, in the format in which training would hold it."""
    import torch

    encoder: nn.Module = build(config.model.vision_encoder).eval()
    if encoder.trainable:
        raise ConfigError("this vision encoder trains", where="model.vision_encoder", fix="cache a frozen one")
    weights = computing_formats(config)["weights"]
    return encoder.to(device, None if weights is None else getattr(torch, weights))


def _encode(encoder: nn.Module, config: DictConfig, device: torch.device) -> Encode:
    """Encoder and codec as one function of images on the CPU."""
    import torch

    from blip2train.model.vision_encoder.token_codec import CODECS, encode_tokens

    codec = CODECS[config.codec]
    name = computing_formats(config)["autocast"]
    autocast = None if name is None else getattr(torch, name)

    @torch.inference_mode()
    def encode(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            tokens = encoder(images.to(device))
        return encode_tokens(tokens, codec).cpu()

    return encode


def _facts(config: DictConfig, encoder: Any) -> FeatureFacts:
    from blip2train.data.feature_cache import FeatureFacts
    from blip2train.model.vision_encoder.token_codec import CODECS, bytes_per_token

    return FeatureFacts(
        encoder=encoder_facts(config),
        codec=config.codec,
        num_tokens=encoder.num_tokens,
        embed_dim=encoder.embed_dim,
        token_bytes=bytes_per_token(CODECS[config.codec], encoder.embed_dim),
        computed_in={**computing_formats(config), "encoder_sha256": _checksum(encoder)},
        max_pixels=config.data.max_pixels,
    )


def _checksum(encoder: nn.Module) -> str:
    """Of the weights as they compute: it tells a hub's files from those that once had the same name."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _report_outcome(notes: dict[str, list[FinishedShard | None]], out: Path) -> None:
    table = Table("dataset", "records", "dropped", "size", title=f"{out}: complete")
    for name, of_dataset in notes.items():
        done = [note for note in of_dataset if note is not None]
        dropped = sum((Counter(note.dropped) for note in done), Counter[str]())
        causes = ", ".join(f"{count:,} {cause}" for cause, count in dropped.most_common()) or "none"
        size = sum(note.entry.num_bytes for note in done)
        table.add_row(name, f"{sum(note.entry.num_records for note in done):,}", causes, _size(size))
    Console().print(table)
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    experiment = chosen.get("experiment") or "NAME"
    log.info("next: blip2train train experiment=%s features=%s", experiment, out)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
