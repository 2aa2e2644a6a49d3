"""What the rest of the package knows of a frozen language model: a visual prompt (B, Q, L) and text in, logits out.

Section 3.3: the projected queries are soft prompts before the text embeddings. Logits and targets leave an adapter
already aligned, so no loss ever shifts (LAVIS shifts inside transformers and masks prompts by counting tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from blip2train.batch import Stage2Batch
from blip2train.errors import CheckpointError, ConfigError
from blip2train.model.precision import to_dtype

ModelSource: TypeAlias = str | Path | Mapping[str, Any] | PreTrainedConfig
"""A local folder or hub name; or, for random weights, a transformers config (object or `model_type` and fields)."""


@dataclass(slots=True)
class LanguageModelOutput:
    """Logits with the token each must predict.

    Args:
        logits: (B, T', V), float32.
        targets: (B, T') int64; `logits[:, t]` predicts `targets[:, t]`; IGNORE_INDEX where there is nothing to predict.
    """

    logits: Tensor
    targets: Tensor


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How to decode; the whole of it: a checkpoint's own generation defaults are not consulted.

    Args:
        max_new_tokens: longest answer in tokens, end token included.
        num_beams: beam width; 1 is greedy. The paper uses 5.
        length_penalty: exponent on the length of a beam; the paper's VQA uses -1 to favour short answers.
        min_new_tokens: tokens before the end token is allowed.
        repetition_penalty: 1 is off.
        do_sample: draw instead of taking the best.
        temperature: of the draw.
        top_p: nucleus of the draw.
        end_id: token that ends an answer; None takes the model's own. BLIP-2 ends OPT's text with a line break.
    """

    max_new_tokens: int
    num_beams: int = 1
    length_penalty: float = 1.0
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    end_id: int | None = None


class LanguageModel(Protocol):
    """A frozen `nn.Module` through which gradients reach the visual prompt and nothing else.

    `visual_prompt=None` means no image at all: the blind baseline and the text oracle.
    """

    @property
    def embed_dim(self) -> int:
        """Width L of the model's input embeddings."""
        ...

    def __call__(self, visual_prompt: Tensor | None, batch: Stage2Batch) -> LanguageModelOutput:
        """Predict the batch's targets after the visual prompt (B, Q, L) and the batch's prompt."""
        ...

    def generate(
        self, visual_prompt: Tensor | None, prompt_ids: Tensor, prompt_mask: Tensor, settings: GenerationSettings
    ) -> Tensor:
        """Continue visual prompt (B, Q, L) and prompt (B, Tp); returns only new ids (B, T), padded at the end."""
        ...


def load_config(source: ModelSource, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """Read or build a transformers config and set single fields of it.

    Raises:
        ConfigError: no such model, an unknown `model_type` or an override that the config does not have.
    """
    where = "model.language_model"
    try:
        if isinstance(source, Mapping):
            config = AutoConfig.for_model(**source)
        elif isinstance(source, str | Path):
            config = AutoConfig.from_pretrained(str(source))
        else:
            config = source
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
    torch_dtype = to_dtype(dtype, where="model.language_model.dtype")
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
            where="model.language_model",
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


def to_generation_config(
    settings: GenerationSettings, config: PreTrainedConfig, start_id: int | None = None
) -> GenerationConfig:
    """Translate settings for transformers, with the special ids of `config` and the decoder's start token.

    Raises:
        ConfigError: no end token is known.
    """
    end_id = settings.end_id if settings.end_id is not None else config.eos_token_id
    if end_id is None:
        raise ConfigError(
            f"{config.model_type} names no end token",
            where="the generation settings' end_id",
            fix="set it to the tokenizer's end token id",
        )
    first_end_id = end_id[0] if isinstance(end_id, list) else end_id
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p} if settings.do_sample else {}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        repetition_penalty=settings.repetition_penalty,
        do_sample=settings.do_sample,
        decoder_start_token_id=start_id,
        eos_token_id=end_id,
        pad_token_id=config.pad_token_id if config.pad_token_id is not None else first_end_id,
        **sampling,
    )


def pack(parts: list[tuple[Tensor, Tensor]], *, side: str) -> tuple[Tensor, Tensor]:
    """Concatenate padded embeddings so that the real tokens of each row are contiguous and in order.

    Args:
        parts: pairs of (B, N, L) embeddings and (B, N) bool masks, in sequence order.
        side: where the padding goes, "right" (training) or "left" (generation).

    Returns:
        (B, M, L) embeddings and the (B, M) bool mask, M the sum of the parts' lengths.
    """
    embeddings_BML = torch.cat([embeddings for embeddings, _ in parts], dim=1)
    mask_BM = torch.cat([mask for _, mask in parts], dim=1)
    first = ~mask_BM if side == "right" else mask_BM
    order_BM = first.to(torch.uint8).argsort(dim=1, stable=True)
    index_BML = order_BM[:, :, None].expand(-1, -1, embeddings_BML.shape[2])
    return embeddings_BML.gather(1, index_BML), mask_BM.gather(1, order_BM)
