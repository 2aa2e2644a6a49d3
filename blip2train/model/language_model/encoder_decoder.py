"""Any sequence-to-sequence model of transformers (Flan-T5, ...) behind a visual prompt: (B, Q, L) and text -> logits.

Implements section 3.3, encoder-decoder LLMs: visual prompt and prefix to the encoder, suffix as the decoder's target.
LAVIS leaves the LLM's dropout on; here only `dropout` does, and float16, in which T5 overflows, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from blip2train.batch import IGNORE_INDEX, Stage2Batch
from blip2train.errors import ConfigError
from blip2train.model.freezing import freeze
from blip2train.model.language_model.base import GenerationSettings, LanguageModelOutput, LogitsProcessor
from blip2train.model.language_model.generation import to_generation_config
from blip2train.model.language_model.loading import ModelSource, load_model
from blip2train.model.language_model.lora import add_lora, train_adapters
from blip2train.model.language_model.packing import own_precision, pack, visual_part
from blip2train.model.precision import check_dtype


class EncoderDecoder(nn.Module):
    """A frozen encoder-decoder LM, with or without a trainable adapter.

    Args:
        path_or_config: local folder or hub name; or a transformers config (object or mapping with `model_type`).
        dtype: number format of the weights: "float32" or "bfloat16".
        weights: False builds a folder's architecture with random weights.
        overrides: single fields of the transformers config to change; LAVIS, for one, runs Flan-T5 with
            `dense_act_fn: gelu` in place of its `gelu_new`.
        dropout: keep the model's own dropout active in training, as LAVIS does; the paper's model is frozen.
        lora: settings of a trainable adapter (`LoraSettings`); None trains nothing here.

    Raises:
        ConfigError: float16, a model that does not say with which token its decoder starts, or settings that do not
            fit.
        CheckpointError: weight files are missing, damaged or incomplete.
    """

    def __init__(
        self,
        path_or_config: ModelSource,
        dtype: str = "float32",
        weights: bool = True,
        overrides: Mapping[str, Any] | None = None,
        dropout: bool = False,
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_dtype("encoder_decoder", dtype, trainable=False, where="llm.model.dtype")
        self.model = load_model(AutoModelForSeq2SeqLM, path_or_config, dtype, weights, overrides or {})
        self.start_id = _start_id(self.model.config)
        self.dropout = dropout
        freeze(self)
        if lora is not None:
            add_lora(self.model, lora)
        self.train()

    @property
    def embed_dim(self) -> int:
        width: int = self.model.get_input_embeddings().embedding_dim
        return width

    @property
    def vocab_size(self) -> int:
        rows: int = self.model.get_input_embeddings().num_embeddings
        return rows

    def train(self, mode: bool = True) -> Self:
        """Frozen means no dropout: only adapters follow the mode, and the whole model where `dropout` says so."""
        super().train(mode and self.dropout)
        train_adapters(self.model, mode)
        return self

    def forward(self, visual_prompt: Tensor | None, batch: Stage2Batch) -> LanguageModelOutput:
        """Predict the target from visual prompt and prompt.

        Args:
            visual_prompt: (B, Q, L), or None for no image.
            batch: the prompt is the prefix; padding may be on either side of it. Targets are padded on the right.

        Returns:
            Logits (B, Tt, V) and targets (B, Tt).

        Raises:
            ConfigError: a row has neither image nor prompt.
        """
        embeddings_BML, mask_BM = self._encoder_inputs(visual_prompt, batch.prompt_ids, batch.prompt_mask)
        with own_precision(embeddings_BML, overflows=True):
            logits_BTV: Tensor = self.model(
                inputs_embeds=embeddings_BML,
                attention_mask=mask_BM.long(),
                decoder_input_ids=_shift_right(batch.target_ids, batch.target_mask, self.start_id),
                use_cache=False,
            ).logits
        targets_BT = batch.target_ids.masked_fill(~batch.target_mask, IGNORE_INDEX)
        return LanguageModelOutput(logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)), targets_BT)

    @torch.no_grad()
    def generate(
        self,
        visual_prompt: Tensor | None,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        settings: GenerationSettings,
        choose: LogitsProcessor | None = None,
    ) -> Tensor:
        """Answer the visual prompt (B, Q, L) and prompt (B, Tp).

        Returns:
            New ids only (B, T), padded after each row's end token.

        Raises:
            ConfigError: a row has neither image nor prompt.
        """
        embeddings_BML, mask_BM = self._encoder_inputs(visual_prompt, prompt_ids, prompt_mask)
        with own_precision(embeddings_BML, overflows=True):
            ids_BT: Tensor = self.model.generate(
                inputs_embeds=embeddings_BML,
                attention_mask=mask_BM.long(),
                generation_config=to_generation_config(settings, self.model.config, self.start_id),
                logits_processor=None if choose is None else [choose],
            )
        return ids_BT[:, 1:]

    def _encoder_inputs(
        self, visual_prompt_BQL: Tensor | None, prompt_ids_BT: Tensor, prompt_mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        prompt = (self.model.get_input_embeddings()(prompt_ids_BT), prompt_mask_BT)
        if visual_prompt_BQL is not None:
            return pack([visual_part(visual_prompt_BQL, prompt), prompt], side="right")
        if prompt_ids_BT.shape[1] == 0 or not bool(prompt_mask_BT.any(dim=1).all()):
            raise ConfigError(
                "nothing to read: a row has no image and an empty prompt",
                where="the prompt of an encoder-decoder language model",
                fix="give the blind run a prompt",
            )
        return pack([prompt], side="right")


def _start_id(config: Any) -> int:
    start_id: int | None = config.decoder_start_token_id
    if start_id is None:
        start_id = config.pad_token_id
    if start_id is None:
        raise ConfigError(
            f"{config.model_type} names neither decoder_start_token_id nor pad_token_id",
            where="the language model's config.json",
            fix="set +llm.model.overrides.decoder_start_token_id",
        )
    return start_id


def _shift_right(target_ids_BT: Tensor, target_mask_BT: Tensor, start_id: int) -> Tensor:
    """Decoder inputs: the start token, then each target but the last. Padding is never read by a real position."""
    starts_B1 = target_ids_BT.new_full((len(target_ids_BT), 1), start_id)
    return torch.cat([starts_B1, target_ids_BT.masked_fill(~target_mask_BT, start_id)[:, :-1]], dim=1)
