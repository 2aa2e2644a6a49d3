"""Words -> tiny OPT and T5 that read descriptions: the language models that stage 2 keeps frozen.

Implements text-only pre-training on `document.py`'s documents, with losses on captions and answers. What makes two
objects bind is the curriculum: at first all tags of an object share one position, later each has its own. LAVIS has no
counterpart: its language models are downloaded.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from blip2train.microworld.document import (
    CausalBatch,
    Document,
    Seq2SeqBatch,
    causal_batch,
    seq2seq_batch,
    write_document,
)
from blip2train.microworld.scene import WorldSpec, sample_scene
from blip2train.microworld.training import Plan
from blip2train.microworld.vocabulary import language_model_ids

LanguageModelPart = Literal["opt", "t5"]
OBJECTS = (1, 2, 2, 3, 3)
"""Numbers of objects in the texts: more than in the images, since one object needs no binding."""
POSITION_SCALE = 0.1


def build_opt() -> OPTForCausalLM:
    """OPT's architecture at width 96, with four layers and sinusoids as initial positions (0.46 M parameters)."""
    ids = language_model_ids()
    config = OPTConfig(
        vocab_size=len(ids),
        hidden_size=96,
        num_hidden_layers=4,
        ffn_dim=384,
        num_attention_heads=4,
        max_position_embeddings=96,
        word_embed_proj_dim=96,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=0.08,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["</s>"],
        eos_token_id=ids["</s>"],
        attn_implementation="eager",
    )
    model = OPTForCausalLM(config)
    table = model.model.decoder.embed_positions.weight
    with torch.no_grad():
        table.copy_(POSITION_SCALE * _sinusoids(*table.shape))
    return model


def build_t5() -> T5ForConditionalGeneration:
    """T5's architecture at width 96: three encoder and two decoder layers (0.5 M parameters).

    Two of its heads start with relative position biases for the left and the right: random ones stay too small for
    thousands of steps to tell which tags are neighbours, and two objects then never bind.
    """
    ids = language_model_ids()
    config = T5Config(
        vocab_size=len(ids),
        d_model=96,
        d_kv=24,
        d_ff=256,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        pad_token_id=ids["<pad>"],
        eos_token_id=ids["</s>"],
        decoder_start_token_id=ids["<pad>"],
        attn_implementation="eager",
    )
    model = T5ForConditionalGeneration(config)
    attention = model.encoder.block[0].layer[0].SelfAttention
    with torch.no_grad():
        attention.relative_attention_bias.weight.copy_(_local_biases())
    return model


def position_biases(model: T5ForConditionalGeneration) -> list[nn.Parameter]:
    """T5's relative position biases, one scalar per bucket and head: to be trained at a higher rate."""
    return [parameter for name, parameter in model.named_parameters() if "relative_attention_bias" in name]


def stacked_share(progress: float) -> float:
    """Share of descriptions with stacked tags: all in the first sixth of training, then down to a quarter."""
    if progress < 1 / 6:
        return 1.0
    return max(0.25, 1.0 - 0.75 * (progress - 1 / 6) / (1 / 3))


def documents_of_step(spec: WorldSpec, plan: Plan, step: int) -> list[Document]:
    """The texts of one step, a pure function of its arguments."""
    rng = random.Random(f"{plan.seed}/{step}")
    share = stacked_share(step / plan.steps)
    many = replace(spec, objects=OBJECTS)
    first = step * plan.batch_size
    scenes = (sample_scene(many, "all", first + index) for index in range(plan.batch_size))
    return [write_document(scene, rng, stacked_share=share) for scene in scenes]


def causal_step(model: OPTForCausalLM, spec: WorldSpec, plan: Plan) -> Callable[[int], Tensor]:
    """Loss of one step of the decoder-only model."""
    ids = language_model_ids()

    def loss_of_step(step: int) -> Tensor:
        return causal_loss(model, causal_batch(documents_of_step(spec, plan, step), ids, ids["<pad>"]))

    return loss_of_step


def seq2seq_step(model: T5ForConditionalGeneration, spec: WorldSpec, plan: Plan) -> Callable[[int], Tensor]:
    """Loss of one step of the encoder-decoder model."""
    ids = language_model_ids()

    def loss_of_step(step: int) -> Tensor:
        rng = random.Random(f"{plan.seed}/prefix/{step}")
        return seq2seq_loss(model, seq2seq_batch(documents_of_step(spec, plan, step), ids, ids["<pad>"], rng))

    return loss_of_step


def causal_loss(model: OPTForCausalLM, batch: CausalBatch) -> Tensor:
    """Weighted mean of the next-token losses over every passage's own view of its description."""
    embeddings_BSL = _embed(model, batch.input_ids, batch.stacked_positions, batch.stacked_ids)
    hidden_BSL = model.model(
        inputs_embeds=embeddings_BSL,
        attention_mask=torch.where(batch.visible, 0.0, torch.finfo(torch.float32).min / 2),
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    logits_VV = model.lm_head(hidden_BSL.flatten(0, 1)[batch.sources])
    losses_V = F.cross_entropy(logits_VV.float(), batch.targets, reduction="none")
    return (losses_V * batch.weights).sum() / batch.weights.sum()


def seq2seq_loss(model: T5ForConditionalGeneration, batch: Seq2SeqBatch) -> Tensor:
    """Weighted mean of the target tokens' losses."""
    logits_NTV = model(
        inputs_embeds=_embed(model, batch.input_ids, batch.stacked_positions, batch.stacked_ids),
        attention_mask=batch.attention_mask.long(),
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(batch.labels),
        use_cache=False,
    ).logits
    losses_NT = F.cross_entropy(logits_NTV.float().transpose(1, 2), batch.labels, reduction="none")
    weights_NT = batch.weights[:, None] * (batch.labels >= 0)
    return (losses_NT * weights_NT).sum() / weights_NT.sum()


def _embed(model: nn.Module, ids: Tensor, stacked_positions: Tensor, stacked_ids: Tensor) -> Tensor:
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    embedded: Tensor = table(ids)
    return embedded.flatten(0, 1).index_add(0, stacked_positions, table(stacked_ids)).view_as(embedded)


def _sinusoids(count: int, width: int) -> Tensor:
    position = torch.arange(count, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(1000.0) / width))
    return torch.stack([torch.sin(position * frequency), torch.cos(position * frequency)], dim=2).flatten(1)


def _local_biases() -> Tensor:
    """(32 buckets, 4 heads): a head that looks left, one that looks right, and two that look anywhere.

    Buckets 0 to 15 hold keys at growing distance to the left, 16 to 31 to the right (T5's bidirectional layout).
    """
    near, far = -0.15 * torch.arange(16, dtype=torch.float32), torch.full((16,), -1.5)
    anywhere = torch.zeros(32)
    return torch.stack([torch.cat([near, far]), torch.cat([far, near]), anywhere, anywhere], dim=1)
