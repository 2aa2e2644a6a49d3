"""A yaml's source -> a transformers model: weights from a folder or the hub, or a random one from a config.

Not in the paper. What transformers does in silence is made loud: the checkpoint's dtype is not adopted, missing tensors
are an error, and the checkpoint's own generation defaults are dropped (LAVIS trusts all three).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from blip2train.errors import CheckpointError, ConfigError
from blip2train.model.precision import to_dtype
from blip2train.weight_files import find_weights, in_folder

ModelSource: TypeAlias = str | Path | Mapping[str, Any] | PreTrainedConfig
"""A local folder or hub name; or, for random weights, a transformers config (object or `model_type` and fields)."""

_TIE = "tie_word_embeddings"


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
        if not (key == _TIE and config.is_encoder_decoder):  # see `_has_own_head`
            setattr(config, key, value)
    return config


def load_model(auto_class: Any, source: ModelSource, dtype: str, weights: bool, overrides: Mapping[str, Any]) -> Any:
    """Build a transformers model: weights from a folder or hub name, random ones from a config or if not `weights`.

    Raises:
        ConfigError: it cannot be found, is of another kind than `auto_class`, or `dtype` is unknown.
        CheckpointError: weight files are missing or damaged, or leave parts of the model out.
    """
    config = load_config(source, overrides)
    torch_dtype = to_dtype(dtype, where="llm.model.dtype")
    own_head = config.is_encoder_decoder and _has_own_head(source, overrides)
    try:
        if weights and isinstance(source, str | Path):
            with _no_advice_on_tying() if own_head else contextlib.nullcontext():
                model = _read_weights(auto_class, source, config, torch_dtype)
            _check_head(model, own_head, source)
        else:
            model = auto_class.from_config(config, dtype=torch_dtype)
            if own_head:
                _give_own_head(model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{config.model_type} cannot be built by {auto_class.__name__}: {str(error).splitlines()[0]}",
            where="llm.model",
            fix="DecoderOnly takes causal models (OPT, LLaMA, ...), EncoderDecoder sequence-to-sequence ones (T5, ...)",
        ) from error
    # a checkpoint's generation_config.json (sampling, penalties) would otherwise change results without a word
    model.generation_config = GenerationConfig()
    return model


def check_causal(config: PreTrainedConfig) -> None:
    """Refuse a BERT-like model, which transformers builds as a causal one but lets read in both directions.

    Raises:
        ConfigError: such a model without `is_decoder`.
    """
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and config.to_dict().get("is_decoder") is False:
        raise ConfigError(
            f"{config.model_type} reads in both directions: its logits see the words they are to predict",
            where="llm.path",
            fix="give a causal language model, or +llm.model.overrides.is_decoder=true for one trained that way",
        )


def _read_weights(auto_class: Any, source: str | Path, config: PreTrainedConfig, dtype: Any) -> Any:
    if Path(source).is_dir():
        find_weights(in_folder(Path(source)), where=str(source))
    try:
        # dtype always: transformers would otherwise take the file's
        model, report = auto_class.from_pretrained(str(source), config=config, dtype=dtype, output_loading_info=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"a pickle with more than tensors in it was not read: {str(error).splitlines()[0]}",
            where=str(source),
            fix="get the weights as safetensors, from someone you trust",
        ) from error
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights do not fit {config.model_type}: {error}",
            where=str(source),
            fix="the config.json beside them, and llm.model.overrides, must describe these weights",
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers gives these parts random weights and goes on
        raise CheckpointError(
            f"the weights lack {len(missing)} tensors of the language model: {', '.join(missing[:8])}",
            where=str(source),
            fix="give a complete checkpoint, or a config instead of a path for random weights",
        )
    return model


def _has_own_head(source: ModelSource, overrides: Mapping[str, Any]) -> bool:
    """Whether an encoder-decoder model is said to have an output layer of its own, as T5 v1.1 and Flan-T5 have.

    transformers 5 reads `tie_word_embeddings: false` of a T5 and then sets it to true, so its config object cannot be
    asked; and false in the object would give encoder and decoder separate input embeddings as well.
    """
    stated: dict[str, Any] = {}
    if isinstance(source, Mapping):
        stated = dict(source)
    elif isinstance(source, str | Path):
        stated = PreTrainedConfig.get_config_dict(str(source))[0]
    return (stated | dict(overrides)).get(_TIE) is False


@contextlib.contextmanager
def _no_advice_on_tying() -> Iterator[None]:
    """transformers advises to set what is set already; to follow it would take T5's encoder its embeddings."""

    def keep(record: logging.LogRecord) -> bool:
        return _TIE not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _give_own_head(model: Any) -> None:
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    head.weight = nn.Parameter(head.weight.new_empty(head.weight.shape))
    head.reset_parameters()
    model.all_tied_weights_keys.pop(f"{name}.weight", None)


def _check_head(model: Any, own_head: bool, source: str | Path) -> None:
    # from weights with a head transformers builds one, whatever the config says; from weights without, it ties
    if own_head and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise CheckpointError(
            "the config states an output layer of its own (tie_word_embeddings: false), the weights have none",
            where=str(source),
            fix="give a complete checkpoint, or +llm.model.overrides.tie_word_embeddings=true",
        )
