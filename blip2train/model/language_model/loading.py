"""A yaml's source -> a transformers model: weights from a folder or the hub, or a random one from a config.

Not in the paper. What transformers does in silence is made loud: the checkpoint's dtype is not adopted, missing tensors
are an error, and the checkpoint's own generation defaults are dropped (LAVIS trusts all three).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from blip2train.errors import CheckpointError, ConfigError
from blip2train.model.precision import to_dtype

ModelSource: TypeAlias = str | Path | Mapping[str, Any] | PreTrainedConfig
"""A local folder or hub name; or, for random weights, a transformers config (object or `model_type` and fields)."""


def load_config(source: ModelSource, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """Read or build a transformers config and set single fields of it.

    Raises:
        ConfigError: no such model, an unknown `model_type` or an override that the config does not have.
    """
    where = "llm.model"
    try:
        if isinstance(source, Mapping):
            config = AutoConfig.for_model(**source)
        elif isinstance(source, str | Path):
            config = AutoConfig.from_pretrained(str(source))
        else:
            config = copy.deepcopy(source)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"no language model from {source!r}: {error}",
            where=where,
            fix="give a local folder with config.json, a hub name, or `model_type` and its fields",
        ) from error
    for key, value in overrides.items():
        if key not in config.to_dict():
            raise ConfigError(
                f"{config.model_type} has no setting {key!r}",
                where=f"{where}.overrides",
                fix=", ".join(config.to_dict()),
            )
        setattr(config, key, value)
    return config


def load_model(auto_class: Any, source: ModelSource, dtype: str, weights: bool, overrides: Mapping[str, Any]) -> Any:
    """Build a transformers model: weights from a folder or hub name, random ones from a config or if not `weights`.

    Raises:
        ConfigError: it cannot be found, is of another kind than `auto_class`, or `dtype` is unknown.
        CheckpointError: the weights leave parts of the model out.
    """
    config = load_config(source, overrides)
    torch_dtype = to_dtype(dtype, where="llm.model.dtype")
    try:
        if weights and isinstance(source, str | Path):
            model, report = auto_class.from_pretrained(
                str(source), config=config, dtype=torch_dtype, output_loading_info=True
            )
            _check_loaded(report, source)
        else:
            model = auto_class.from_config(config, dtype=torch_dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{config.model_type} cannot be built by {auto_class.__name__}: {error}",
            where="llm.model",
            fix="DecoderOnly takes causal models (OPT, LLaMA, ...), EncoderDecoder sequence-to-sequence ones (T5, ...)",
        ) from error
    # a checkpoint's generation_config.json (sampling, penalties) would otherwise change results without a word
    model.generation_config = GenerationConfig()
    return model


def _check_loaded(report: Mapping[str, Any], source: str | Path) -> None:
    # transformers gives parts that the file lacks random weights and goes on
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"the weights lack {len(missing)} tensors of the language model: {', '.join(missing[:8])}",
            where=str(source),
            fix="give a complete checkpoint, or a config instead of a path for random weights",
        )
