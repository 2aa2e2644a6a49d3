"""Any causal language model of transformers (OPT, LLaMA, ...) behind a visual prompt: (B, Q, L) and text -> logits.

Implements section 3.3, decoder-based LLMs: visual prompt, prompt, target in one sequence, loss on the target only.
LAVIS has one class per LLM, leaves dropout on and projects the visual prompt's positions to the vocabulary too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from blip2train.batch import IGNORE_INDEX, Stage2Batch
from blip2train.errors import ConfigError
from blip2train.model.freezing import freeze
from blip2train.model.language_model.base import GenerationSettings, LanguageModelOutput, LogitsProcessor
from blip2train.model.language_model.generation import to_generation_config
from blip2train.model.language_model.loading import ModelSource, check_causal, load_model
from blip2train.model.language_model.lora import add_lora, train_adapters
from blip2train.model.language_model.packing import Part, own_precision, pack, visual_part
from blip2train.model.precision import check_dtype


class DecoderOnly(nn.Module):
    """A frozen causal LM, with or without a trainable adapter.

    Training sequences are packed (padding only at the end), so causality alone keeps real tokens from seeing padding:
    no mask is passed, positions count from 0 in every architecture, and attention takes its fastest path.

    Args:
        path_or_config: local folder or hub name; or a transformers config (object or mapping with `model_type`).
        dtype: number format of the weights: "float32", "float16" or "bfloat16".
        weights: False builds a folder's architecture with random weights.
        overrides: single fields of the transformers config to change.
        dropout: keep the model's own dropout active in training, as LAVIS does; the paper's model is frozen.
        lora: settings of a trainable adapter (`LoraSettings`); None trains nothing here.

    Raises:
        ConfigError: a model that is not causal, or settings that do not fit.
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
        check_dtype("decoder_only", dtype, trainable=False, where="llm.model.dtype")
        self.model = load_model(AutoModelForCausalLM, path_or_config, dtype, weights, overrides or {})
        check_causal(self.model.config)
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
        """Predict the target after visual prompt and prompt.

        Args:
            visual_prompt: (B, Q, L), or None for no image.
            batch: prompt may be empty; padding may be on either side.

        Returns:
            Logits (B, Tt, V) and targets (B, Tt). A row's first target is ignored where nothing precedes it (no image
            and an empty prompt): there is no position that could predict it.

        Raises:
            ConfigError: a sequence longer than the model has positions.
        """
        parts = [
            *self._prompt_parts(visual_prompt, batch.prompt_ids, batch.prompt_mask),
            (self._embed(batch.target_ids), batch.target_mask),
        ]
        embeddings_BML, _ = pack(parts, side="right")
        num_targets, num_prompt = batch.target_ids.shape[1], batch.prompt_ids.shape[1]
        length = embeddings_BML.shape[1]
        self._check_length(length)
        num_visual = length - num_prompt - num_targets
        # one look at the mask saves copying logits: targets then start in the same column of every row
        aligned = num_visual + num_prompt > 0 and bool(batch.prompt_mask.all())
        # what precedes every row's last prompt token predicts no target and is not projected to the vocabulary
        num_kept = num_targets + 1 if aligned else min(num_prompt + num_targets + 1, length)
        logits_BNV = self._run(embeddings_BML, num_kept)
        first = length - logits_BNV.shape[1]
        targets_BT = _left_justified(batch.target_ids, batch.target_mask)
        if aligned:
            start = num_visual + num_prompt - 1 - first
            return LanguageModelOutput(logits_BNV[:, start : start + num_targets], targets_BT)
        column_T = torch.arange(num_targets, device=targets_BT.device)
        position_BT = num_visual + batch.prompt_mask.sum(dim=1)[:, None] - 1 + column_T
        index_BTV = (position_BT - first).clamp(min=0)[:, :, None].expand(-1, -1, logits_BNV.shape[2])
        return LanguageModelOutput(
            logits_BNV.gather(1, index_BTV), targets_BT.masked_fill(position_BT < 0, IGNORE_INDEX)
        )

    @torch.no_grad()
    def generate(
        self,
        visual_prompt: Tensor | None,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        settings: GenerationSettings,
        choose: LogitsProcessor | None = None,
    ) -> Tensor:
        """Continue the visual prompt (B, Q, L) and prompt (B, Tp).

        Returns:
            New ids only (B, T), padded after each row's end token.

        Raises:
            ConfigError: a row has neither image nor prompt, or the model has too few positions.
        """
        embeddings_BML, mask_BM = pack(self._prompt_parts(visual_prompt, prompt_ids, prompt_mask), side="left")
        self._check_length(embeddings_BML.shape[1], settings.max_new_tokens)
        if visual_prompt is None and (mask_BM.shape[1] == 0 or not bool(mask_BM.any(dim=1).all())):
            raise ConfigError(
                "nothing to continue: a row has no image and an empty prompt",
                where="the benchmark's prompt",
                fix="give the blind run a prompt",
            )
        with own_precision(embeddings_BML):
            ids_BT: Tensor = self.model.generate(
                inputs_embeds=embeddings_BML,
                attention_mask=mask_BM.long(),
                generation_config=to_generation_config(settings, self.model.config),
                logits_processor=None if choose is None else [choose],
            )
        return ids_BT

    def _check_length(self, length: int, num_new: int = 0) -> None:
        longest = self.model.config.to_dict().get("max_position_embeddings")
        if longest is not None and length + num_new > longest:
            raise ConfigError(
                f"visual prompt and text are {length} tokens long, {num_new} may follow, but "
                f"{self.model.config.model_type} has {longest} positions",
                where="the prompt and max_tokens of the data, max_new_tokens of the benchmark",
                fix="shorten one of them, or take a language model of longer texts",
            )

    def _prompt_parts(
        self, visual_prompt_BQL: Tensor | None, prompt_ids_BT: Tensor, prompt_mask_BT: Tensor
    ) -> list[Part]:
        prompt = (self._embed(prompt_ids_BT), prompt_mask_BT)
        return [prompt] if visual_prompt_BQL is None else [visual_part(visual_prompt_BQL, prompt), prompt]

    def _embed(self, ids_BT: Tensor) -> Tensor:
        embedded_BTL: Tensor = self.model.get_input_embeddings()(ids_BT)
        return embedded_BTL

    def _run(self, embeddings_BML: Tensor, num_kept: int) -> Tensor:
        with own_precision(embeddings_BML):
            logits_BNV: Tensor = self.model(
                inputs_embeds=embeddings_BML, use_cache=False, logits_to_keep=num_kept
            ).logits
        return logits_BNV.to(torch.promote_types(logits_BNV.dtype, torch.float32))


def _left_justified(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Real ids first, in order; IGNORE_INDEX after them."""
    order_BT = (~mask_BT).to(torch.uint8).argsort(dim=1, stable=True)
    return ids_BT.masked_fill(~mask_BT, IGNORE_INDEX).gather(1, order_BT)
