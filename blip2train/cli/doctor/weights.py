"""Check "weights": every file that training would read before its first step, present and readable; fetches nothing.

Vision encoder, BERT of a new Q-Former, tokenizer, language model, and the run that a stage starts from. LAVIS finds a
missing one out when it gets there, after everything before it has been loaded.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from blip2train.cli import check
from blip2train.cli.doctor.context import Context
from blip2train.cli.doctor.hub import HubState, cached, hub_state, remote_bytes
from blip2train.cli.doctor.row import Row, of_error
from blip2train.errors import Blip2TrainError, ConfigError
from blip2train.run_dir import RunDir
from blip2train.weight_files import INDEX, NAMES, find_weights, in_folder

CHECK = "weights"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer.model", "spiece.model", "vocab.json")
"""Any of them makes a tokenizer, with its config or without."""


def check_weights(context: Context) -> Iterator[Row]:
    """One row per source; each is looked at whatever the others are."""
    config = context.to_build
    sources = list(_sources(config))
    if not sources:
        yield Row(CHECK, "ok", "every weight starts random: nothing is read")
    for name, look in sources:
        try:
            yield look()
        except Blip2TrainError as error:
            row = of_error(CHECK, error)
            yield Row(CHECK, row.status, f"{name}: {row.measured}", row.advice)


def _sources(config: DictConfig) -> Iterator[tuple[str, Callable[[], Row]]]:
    encoder = config.model.vision_encoder
    if encoder.get("weights"):
        yield "vision encoder", functools.partial(look_at_path, "vision encoder", Path(str(encoder.weights)))
    elif encoder.get("pretrained"):
        yield "vision encoder", functools.partial(look_at_timm, str(encoder.name))
    if config.init_from not in (None, "scratch"):
        yield "init_from", functools.partial(look_at_run, str(config.init_from))
    elif config.init_qformer is not None:
        bert = str(config.init_qformer)
        yield "init_qformer", functools.partial(look_at_model, "init_qformer", bert, "init_qformer")
    path = OmegaConf.select(config, "data.collator.tokenizer.path")
    if path is not None:
        yield "tokenizer", functools.partial(look_at_tokenizer, str(path))
    if check.stage_number(config) == 2:
        source = config.model.language_model.path_or_config
        if isinstance(source, str) and config.model.language_model.get("weights", True):
            yield "language model", functools.partial(look_at_model, "language model", source, "llm.path")


def look_at_path(name: str, path: Path) -> Row:
    """A weights file, or a folder of them: there, and whole as far as headers tell."""
    if path.is_dir():
        files = find_weights(in_folder(path), where=str(path))
    elif path.is_file():
        files = (
            find_weights(lambda wanted: path if wanted == NAMES[0] else None, where=str(path))
            if (path.suffix == ".safetensors")
            else [_try_to_open(path)]
        )
    else:
        raise ConfigError(f"no file {path}", where=name, fix="copy the file there, or correct the path")
    return Row(CHECK, "ok", f"{name}: {path}, {_size(files)}")


def look_at_timm(model: str) -> Row:
    """timm's own weights of a model."""
    from blip2train.model.vision_encoder.pretrained import pretrained_place

    place = pretrained_place(model)
    if place is None:
        raise ConfigError(
            f"timm has no weights on the hub for {model}",
            where="model.vision_encoder.name",
            fix="a name with a tag (timm.list_pretrained() has all), or model.vision_encoder.weights=FILE",
        )
    found = cached(*place)
    if found is not None:
        return Row(CHECK, "ok", f"vision encoder: {model} in the cache, {_size([found])}")
    return not_cached("vision encoder", place[0], [place[1]], hub_state(), "model.vision_encoder.weights=FILE")


def look_at_model(name: str, source: str, key: str) -> Row:
    """A transformers model: a folder, or a repository of the hub with all shards in the cache."""
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise ConfigError(f"no config.json in {source}", where=key, fix="copy the whole folder of the model")
        files = find_weights(in_folder(Path(source)), where=source)
        return Row(CHECK, "ok", f"{name}: {source}, {_size(files)}")
    if cached(source, ["config.json"]) is None or cached(source, NAMES) is None:
        return not_cached(name, source, [["config.json"], NAMES], hub_state(), f"{key}=FOLDER")
    absent = _absent_shards(source)
    if absent:
        return not_cached(name, source, [[shard] for shard in absent], hub_state(), f"{key}=FOLDER")
    files = find_weights(lambda wanted: cached(source, [wanted]), where=source)
    return Row(CHECK, "ok", f"{name}: {source} in the cache, {_size(files)}")


def look_at_tokenizer(source: str) -> Row:
    """A tokenizer's files; those of a folder may be any of the known kinds."""
    if Path(source).is_dir():
        there = [Path(source) / name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
        if not there:
            raise ConfigError(
                f"no tokenizer in {source} (none of {', '.join(TOKENIZER_FILES)})",
                where="data.collator.tokenizer.path",
                fix="copy the tokenizer's files there",
            )
        return Row(CHECK, "ok", f"tokenizer: {there[0]}")
    found = cached(source, TOKENIZER_FILES)
    if found is not None:
        return Row(CHECK, "ok", f"tokenizer: {source} in the cache")
    return not_cached("tokenizer", source, [TOKENIZER_FILES], hub_state(), "a folder as its path")


def look_at_run(folder: str) -> Row:
    """The run that this one starts from, with a checkpoint that is whole."""
    from blip2train.checkpoint.find import find_checkpoint
    from blip2train.checkpoint.verify import WEIGHTS

    run = RunDir.open(folder, where="init_from=")
    checkpoint = find_checkpoint(run)
    return Row(CHECK, "ok", f"init_from: {checkpoint}, {_size([checkpoint / WEIGHTS])}, its checksum is right")


def not_cached(name: str, repository: str, files: Sequence[Sequence[str]], hub: HubState, instead: str) -> Row:
    """Files that training would fetch: a warning where the hub answers, else it would end there.

    Args:
        name: what they are for.
        repository: on the hub.
        files: each with its alternatives.
        hub: as it is seen from here.
        instead: the setting that takes a local one.
    """
    sought = " and ".join(" or ".join(names) for names in files)
    found = f"{name}: {sought} of {repository} not in {hub.cache}"
    fetch = f"on a machine with network: hf download {repository}; then set HF_HOME to that cache here, or {instead}"
    if hub.offline:
        return Row(CHECK, "fail", f"{found}; HF_HUB_OFFLINE is set", fetch)
    sizes = [remote_bytes(repository, names) for names in files]
    if None in sizes:
        return Row(CHECK, "fail", f"{found}; the hub does not answer, or does not have it", fetch)
    total = sum(size for size in sizes if size)
    return Row(CHECK, "warn", f"{found}; {total / 1e9:.2f} GB or more to fetch", f"hf download {repository}")


def _absent_shards(source: str) -> list[str]:
    """Shards that the first file found in the cache, an index, names and the cache lacks."""
    first = cached(source, NAMES)
    if first is None or not first.name.endswith(INDEX):
        return []
    shards = {*json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()}
    return [shard for shard in sorted(shards) if cached(source, [shard]) is None]


def _try_to_open(path: Path) -> Path:
    """A pickle shows what is in it only when it is read whole; that it can be opened must do."""
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror})", where=str(path), fix="see its owner and mode"
        ) from error
    if empty:
        raise ConfigError(f"{path} is empty", where=str(path), fix="copy or fetch it again")
    return path


def _size(files: Sequence[Path]) -> str:
    total = sum(path.stat().st_size for path in files)
    return f"{total / 1e9:.2f} GB" if total >= 1e8 else f"{total / 1e6:.1f} MB"
