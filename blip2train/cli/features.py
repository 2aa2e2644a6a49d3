"""`features=FOLDER`: a training config -> the config that is built where a cache stands for images and encoder.

The run's own config.yaml keeps encoder and datasets, so that an evaluation builds the real encoder again.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from blip2train.cli.config import build
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir

log = logging.getLogger(__name__)

AUGMENTATION_OFF = (
    "features: augmentation is off; every picture was encoded once, under the evaluation transform. The paper trains "
    "with random crops and flips"
)
_NO_VALUE = ("image", "weights", "pretrained", "trainable_blocks", "checkpoint_activations")
"""Settings of an encoder that are looked at apart, or that change no token."""


def with_features(config: DictConfig) -> DictConfig:
    """The config to build: `config` itself, or, where it names `features`, a copy that reads them.

    Raises:
        ConfigError: no such cache, one of another encoder (names every difference, with both values), of another
            `data.max_pixels`, without one of the datasets, or an encoder that trains.
    """
    if not config.get("features"):
        return config
    from blip2train.data.feature_cache import describe_differences, find_dataset, read_facts, read_sources

    folder = Path(str(config.features))
    facts = read_facts(folder)
    check_frozen(config)
    log.warning(AUGMENTATION_OFF)
    changed = describe_differences(facts.encoder, encoder_facts(config))
    if changed:
        raise ConfigError(
            f"the feature cache is of another encoder: {'; '.join(changed)}",
            where=f"features={folder}, model.vision_encoder",
            fix="train with the encoder of the cache, or make a cache for this one (blip2train data cache-features)",
        )
    if facts.max_pixels not in (None, config.data.max_pixels):
        raise ConfigError(
            f"the feature cache holds pictures up to {facts.max_pixels} pixels, this run's data up to "
            f"{config.data.max_pixels}: other records would be dropped",
            where=f"features={folder}, data.max_pixels",
            fix=f"data.max_pixels={facts.max_pixels}, or make a cache with this limit",
        )
    formats = computing_formats(config)
    computed = {name: facts.computed_in.get(name) for name in formats}
    if computed != formats:
        log.warning("features: computed with %s, where this run's own encoder would have %s", computed, formats)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    image = plain["model"]["vision_encoder"]["image"]
    plain["model"]["vision_encoder"] = {
        "_target_": "blip2train.model.vision_encoder.cached.CachedVisionEncoder",
        "image": image,
        "num_tokens": facts.num_tokens,
        "embed_dim": facts.embed_dim,
        "codec": facts.codec,
    }
    for dataset in plain["data"]["datasets"].values():
        made_from = read_sources(folder / dataset["name"])
        if made_from not in (None, dataset["urls"], [dataset["urls"]]):
            log.warning(
                "features: %s was made from %s; captions, too, are those. %s, its urls here, are not read",
                *(dataset["name"], made_from, dataset["urls"]),
            )
        dataset["urls"] = [find_dataset(folder, dataset["name"])]
        dataset |= {"index": None, "storage_options": {}}
        dataset["transform"] = {
            "_target_": "blip2train.data.stored_tokens.StoredTokens",
            "num_tokens": facts.num_tokens,
            "token_bytes": facts.token_bytes,
        }
    built: DictConfig = OmegaConf.create(plain)
    return built


def describe_features(config: DictConfig) -> dict[str, Any]:
    """What a run's manifest says of its features; null without them."""
    if not config.get("features"):
        return {"features": None}
    from blip2train.data.feature_cache import read_facts

    folder = Path(str(config.features))
    return {"features": {"folder": str(folder), "augmentation": "off", **asdict(read_facts(folder))}}


def check_same_features(config: DictConfig, run: RunDir) -> None:
    """A resumed run must go on from the cache it began with: the folder's name does not tell.

    Raises:
        ConfigError: the folder holds another cache now; names every difference.
    """
    from blip2train.data.feature_cache import describe_differences

    if not config.get("features"):
        return
    changed = describe_differences(run.read_manifest().get("features") or {}, describe_features(config)["features"])
    if changed:
        raise ConfigError(
            f"the feature cache is not the one that this run began with: {'; '.join(changed)}",
            where=f"features={config.features}, {run.manifest_path}",
            fix="make the same cache again, or choose another run_dir= for a new run",
        )


def check_frozen(config: DictConfig) -> None:
    """ConfigError if any of the encoder trains: its tokens change with every step."""
    trained = config.model.vision_encoder.get("trainable_blocks", 0)
    if trained:
        raise ConfigError(
            f"trainable_blocks is {trained}: the tokens of an encoder that trains change with every step",
            where="model.vision_encoder.trainable_blocks",
            fix="0, or train without features",
        )
    if config.get("init_from") in (None, "scratch"):
        return
    from blip2train.checkpoint.find import find_checkpoint
    from blip2train.checkpoint.io import WEIGHTS, read_names

    run = RunDir.open(config.init_from, where="init_from=")
    if any(name.startswith("vision_encoder.") for name in read_names(find_checkpoint(run) / WEIGHTS)):
        raise ConfigError(
            "the run to start from has trained its vision encoder, whose weights are in its checkpoint alone",
            where=f"init_from={run.path}",
            fix="train without features from here; they are for an encoder that no stage has trained",
        )


def encoder_facts(config: DictConfig) -> dict[str, Any]:
    """Everything of a config that decides an image's tokens: encoder, layer, image, weights, transform.

    Raises:
        ConfigError: an encoder without weights, or whose weights are not where they should be.
    """
    encoder = config.model.vision_encoder
    settings: Any = OmegaConf.to_container(encoder, resolve=True)
    return {
        **{name: value for name, value in settings.items() if name not in _NO_VALUE},
        "image": asdict(build(encoder.image)),
        "weights": _weights(settings),
        "transform": "evaluation: resized to the square, no crop, no flip",
    }


def computing_formats(config: DictConfig) -> dict[str, str | None]:
    """The number formats that the trainer's precision imposes on a frozen encoder: weights and autocast."""
    from blip2train.model.memory import parse_precision

    precision = parse_precision(str(config.trainer.get("precision") or "32-true"))
    formats = {"weights": precision.weights, "autocast": precision.autocast}
    return {name: None if dtype is None else str(dtype).removeprefix("torch.") for name, dtype in formats.items()}


def _weights(settings: dict[str, Any]) -> str:
    """Where the encoder's weights come from: a file by its checksum, timm's by the encoder's name."""
    path = settings.get("weights")
    if path is None and settings.get("pretrained"):
        return "timm's own for this name"
    if path is None:
        raise ConfigError(
            "an encoder with random weights: nothing could tell its features from another one's",
            where="model.vision_encoder",
            fix="set pretrained=true, or weights=FILE",
        )
    if not Path(path).is_file():
        raise ConfigError(
            f"no file {path}: the weights of the cached features are compared with it, and an evaluation needs it",
            where="model.vision_encoder.weights",
            fix="give the encoder's weights",
        )
    with Path(path).open("rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
