"""Our generation settings -> transformers' GenerationConfig, with nothing taken from a checkpoint but token ids.

The paper decodes with five beams and, for VQA, a length penalty of -1 (section 4.1). LAVIS's defaults differ from call
to call; here the settings of a benchmark are all there is.
"""

from __future__ import annotations

from transformers import GenerationConfig, PreTrainedConfig

from blip2train.errors import ConfigError
from blip2train.model.language_model.base import GenerationSettings


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
