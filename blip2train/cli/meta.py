"""The model of a config without its weights: full size, on torch's meta device, in seconds and offline.

What `show params` and `show estimate` look at: a meta tensor has a shape and a dtype but no memory. LAVIS prints its
counts after it has loaded every backbone.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from blip2train.cli.config import build
from blip2train.errors import ConfigError
from blip2train.model.vision_encoder.base import VisionEncoder

log = logging.getLogger(__name__)


def build_meta(config: DictConfig) -> nn.Module:
    """Build the model of a train config on the meta device; no weights are read and no network is asked.

    Args:
        config: a composed train config. The language model's shape is that of `llm.path` where this is a local folder,
            else `llm.architecture`.

    Raises:
        ConfigError: the language model has neither, or a part refuses its settings.
    """
    model = without_weights(config)
    with torch.device("meta"), _no_word_on_random_weights():
        built: nn.Module = build(model)
    return built


def build_meta_encoder(config: DictConfig) -> VisionEncoder:
    """The vision encoder alone, as `build_meta` builds it: its sizes, before its weights are read.

    Raises:
        ConfigError: it refuses its settings.
    """
    settings: Any = OmegaConf.to_container(config.model.vision_encoder, resolve=True)
    with torch.device("meta"), _no_word_on_random_weights():
        encoder: VisionEncoder = build(_unweighted(settings))
    return encoder


def without_weights(config: DictConfig) -> dict[str, Any]:
    """The `model` node of a config, resolved, with every source of weights taken out."""
    model: Any = OmegaConf.to_container(config.model, resolve=True)
    model["vision_encoder"] = _unweighted(model["vision_encoder"])
    if "language_model" in model:
        model["language_model"] |= {"path_or_config": _architecture(config), "weights": False}
    return dict(model)


def _unweighted(encoder: dict[str, Any]) -> dict[str, Any]:
    """Settings of an encoder without the sources of weights that it has; one that reads cached features has none."""
    return encoder | {name: value for name, value in (("pretrained", False), ("weights", None)) if name in encoder}


def _architecture(config: DictConfig) -> Any:
    path = Path(str(config.llm.path))
    if (path / "config.json").is_file():
        return str(path)
    architecture = config.llm.get("architecture", None)
    if architecture is None:
        raise ConfigError(
            f"the shape of {config.llm.path} is not known without reading it",
            where="llm.architecture",
            fix="state it in the language model's yaml (`model_type` and the sizes), or give llm.path a local folder",
        )
    log.info("the language model's shape is llm.architecture; %s itself is not read", config.llm.path)
    return OmegaConf.to_container(architecture, resolve=True)


@contextlib.contextmanager
def _no_word_on_random_weights() -> Iterator[None]:
    """Nobody will use these weights, so nobody needs to hear that they are random."""
    logger = logging.getLogger("blip2train.model")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
