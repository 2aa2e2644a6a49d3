"""Models of ours with the weights of a recorded LAVIS run, its batches, and LAVIS's tensors under our parameter names.

The recordings come from LAVIS itself: `lavis_numerics` beside the checkout from its HEAD, others from the released
1.0.2 by scripts/parity/record_lavis.py. Sizes are read from a recording's `args` and tensors. The rename table is
written from the names in LAVIS's state dicts, apart from the one that blip2train converts with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blip2train.batch import ImageSpec, Stage1Batch, Stage2Batch
from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.language_model.decoder_only import DecoderOnly
from blip2train.model.language_model.encoder_decoder import EncoderDecoder
from blip2train.model.qformer.qformer import QFormer
from blip2train.model.vision_encoder.timm_vit import TimmVisionEncoder

RECORDINGS = Path(__file__).parent / "data" / "lavis_recordings"
_LAYER = r"Qformer\.bert\.encoder\.layer\.(\d+)\."
_CLIP_LAYER = r"visual_encoder\.transformer\.resblocks\.(\d+)\."
_VISION = r"vision_encoder.encoder.backbone."
RENAMES = [
    (r"temp", r"temperature"),
    (r"query_tokens", r"qformer.query_tokens"),
    (r"(ln_vision|vision_proj|text_proj|itm_head)\.(.*)", r"\1.\2"),
    (r"(?:opt|t5)_proj\.(.*)", r"projection.\1"),
    (r"(?:opt|t5)_model\.(.*)", r"language_model.model.\1"),
    (r"visual_encoder\.class_embedding", _VISION + r"cls_token"),
    (r"visual_encoder\.positional_embedding", _VISION + r"pos_embed"),
    (r"visual_encoder\.conv1\.weight", _VISION + r"patch_embed.proj.weight"),
    (r"visual_encoder\.ln_pre\.(.*)", _VISION + r"norm_pre.\1"),
    (_CLIP_LAYER + r"ln_(\d)\.(.*)", _VISION + r"blocks.\1.norm\2.\3"),
    (_CLIP_LAYER + r"attn\.in_proj_(.*)", _VISION + r"blocks.\1.attn.qkv.\2"),
    (_CLIP_LAYER + r"attn\.out_proj\.(.*)", _VISION + r"blocks.\1.attn.proj.\2"),
    (_CLIP_LAYER + r"mlp\.c_fc\.(.*)", _VISION + r"blocks.\1.mlp.fc1.\2"),
    (_CLIP_LAYER + r"mlp\.c_proj\.(.*)", _VISION + r"blocks.\1.mlp.fc2.\2"),
    (r"visual_encoder\.(.*)", _VISION + r"\1"),  # timm kept the names of EVA's tower
    (r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight", r"qformer.text_embeddings.\1.weight"),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.(.*)", r"qformer.embedding_norm.\1"),
    (_LAYER + r"attention\.self\.(.*)", r"qformer.blocks.\1.self_attention.\2"),
    (_LAYER + r"attention\.output\.dense\.(.*)", r"qformer.blocks.\1.self_attention.output.\2"),
    (_LAYER + r"attention\.output\.LayerNorm\.(.*)", r"qformer.blocks.\1.self_attention.norm.\2"),
    (_LAYER + r"crossattention\.self\.(.*)", r"qformer.blocks.\1.cross_attention.\2"),
    (_LAYER + r"crossattention\.output\.dense\.(.*)", r"qformer.blocks.\1.cross_attention.output.\2"),
    (_LAYER + r"crossattention\.output\.LayerNorm\.(.*)", r"qformer.blocks.\1.cross_attention.norm.\2"),
    (_LAYER + r"intermediate\.dense\.(.*)", r"qformer.blocks.\1.text_ffn.expand.\2"),
    (_LAYER + r"output\.dense\.(.*)", r"qformer.blocks.\1.text_ffn.contract.\2"),
    (_LAYER + r"output\.LayerNorm\.(.*)", r"qformer.blocks.\1.text_ffn.norm.\2"),
    (_LAYER + r"intermediate_query\.dense\.(.*)", r"qformer.blocks.\1.query_ffn.expand.\2"),
    (_LAYER + r"output_query\.dense\.(.*)", r"qformer.blocks.\1.query_ffn.contract.\2"),
    (_LAYER + r"output_query\.LayerNorm\.(.*)", r"qformer.blocks.\1.query_ffn.norm.\2"),
    (r"Qformer\.cls\.predictions\.transform\.dense\.(.*)", r"qformer.lm_head.dense.\1"),
    (r"Qformer\.cls\.predictions\.transform\.LayerNorm\.(.*)", r"qformer.lm_head.norm.\1"),
    (r"Qformer\.cls\.predictions\.bias", r"qformer.lm_head.bias"),
]
ADDED_DIMENSIONS = {"visual_encoder.class_embedding": 2, "visual_encoder.positional_embedding": 1}
"""Leading dimensions of 1 that timm's embeddings have and those of LAVIS's CLIP have not."""
TIED = {
    "Qformer.bert.embeddings.position_ids": "a constant buffer",
    "Qformer.cls.predictions.decoder.weight": "the word embeddings",
    "Qformer.cls.predictions.decoder.bias": "cls.predictions.bias",
}


@dataclass
class LavisRun:
    """One recording: `facts` is its JSON, `tensors` its safetensors."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def ours(self, group: str) -> dict[str, Tensor]:
        """Tensors of a group ("state_dict", "grads", "after_adamw") under our parameter names."""
        return rename(self._group(group))

    def rank(self, number: int) -> LavisRun:
        """What one rank of a recording of several was given and computed, with the weights that all of them share."""
        shared = {key: tensor for key, tensor in self.tensors.items() if not key.startswith("ranks")}
        prefix = f"ranks{number}/"
        own_facts = {key.removeprefix(prefix): fact for key, fact in self.facts.items() if key.startswith(prefix)}
        return LavisRun(self.facts | own_facts, shared | self._group(f"ranks{number}"))

    def tolerance(self, single: float, double: float) -> float:
        """`single` for a recording in float32, `double` for one in float64."""
        return double if self.tensors["state_dict/query_tokens"].dtype == torch.float64 else single

    def _group(self, name: str) -> dict[str, Tensor]:
        prefix = f"{name}/"
        return {key.removeprefix(prefix): item for key, item in self.tensors.items() if key.startswith(prefix)}


class NormalisedImages(nn.Module):
    """A vision encoder for images that LAVIS has already normalised: float (B, 3, h, w) in."""

    def __init__(self, encoder: TimmVisionEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.image, self.embed_dim, self.num_tokens = encoder.image, encoder.embed_dim, encoder.num_tokens
        self.trainable = encoder.trainable

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder.backbone.forward_features(pixel_values)


def shared_run(shared_data: Path, name: str) -> LavisRun:
    """One of LAVIS's HEAD: "stage1_six_captions", "stage1_two_ranks", "stage2_opt"."""
    return load_run(shared_data / "lavis_numerics", name)


def load_run(folder: Path, name: str) -> LavisRun:
    return LavisRun(json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors"))


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate LAVIS's names to ours; every name is translated or listed in TIED."""
    return {
        our_name(key): tensor[(None,) * ADDED_DIMENSIONS.get(key, 0)]
        for key, tensor in state.items()
        if key not in TIED
    }


def our_name(key: str) -> str:
    for pattern, replacement in RENAMES:
        found = re.fullmatch(pattern, key)
        if found:
            return found.expand(replacement)
    raise KeyError(f"no rename for {key}")


def build_stage1(run: LavisRun) -> Blip2Stage1:
    """Our stage 1 with the recorded weights; its vision encoder takes normalised float images."""
    model = Blip2Stage1(vision_encoder(run.facts["args"]), _qformer(run), run.facts["args"]["embed_dim"])
    return _load(model, run)


def build_stage2(run: LavisRun) -> Blip2Stage2:
    """Our stage 2 with the recorded weights and its OPT or T5."""
    config = run.facts["lm_config"]
    fields = {key: config[key] for key in LANGUAGE_MODEL_FIELDS if key in config}
    if config["model_type"] == "opt":
        language_model: DecoderOnly | EncoderDecoder = DecoderOnly(fields)
    else:  # newer transformers derive the activation from feed_forward_proj, where LAVIS sets it apart
        language_model = EncoderDecoder(fields, overrides={"dense_act_fn": config["dense_act_fn"]})
    return _load(Blip2Stage2(vision_encoder(run.facts["args"]), _qformer(run), language_model), run)


TOWERS = {"eva_clip_g": "eva_giant_patch14_clip_224", "clip_L": "vit_large_patch14_clip_quickgelu_224"}
TEXT_PARTS = ("input_ids", "attention_mask")
LANGUAGE_MODEL_FIELDS = [
    "model_type", "vocab_size", "bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id",
    "tie_word_embeddings",
    # OPT
    "max_position_embeddings", "num_attention_heads", "word_embed_proj_dim", "ffn_dim", "hidden_size",
    "num_hidden_layers", "dropout", "attention_dropout", "activation_function", "do_layer_norm_before",
    # T5
    "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "relative_attention_num_buckets",
    "relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon", "feed_forward_proj",
]  # fmt: skip


def stage1_batch(run: LavisRun, first_image: int = 0) -> Stage1Batch:
    """LAVIS pads every text to the same length; ours go to the longest, which must not matter."""
    mask = run.tensors["attention_mask"].bool()
    longest = int(mask.sum(dim=1).max())
    return Stage1Batch(
        pixel_values=run.tensors["image"],
        input_ids=run.tensors["input_ids"][:, :longest],
        attention_mask=mask[:, :longest],
        image_ids=torch.arange(first_image, first_image + len(mask)),  # LAVIS knows of no equal images
        keys=[str(row) for row in range(len(mask))],
    )


def stage2_batch(run: LavisRun) -> Stage2Batch:
    """OPT: one text, of which the first `prompt_length` tokens are the prompt. T5: input and output."""
    image = run.tensors["image"]
    keys = [str(row) for row in range(len(image))]
    groups = [key.removesuffix("/input_ids") for key in run.tensors if key.endswith("/input_ids")]
    if len(groups) == 2:
        source, target = sorted(groups, key=lambda group: "out" in group)
        texts = [run.tensors[f"{group}/{part}"] for group in (source, target) for part in TEXT_PARTS]
        return Stage2Batch(image, texts[0], texts[1].bool(), texts[2], texts[3].bool(), keys)
    ids, mask = run.tensors["text/input_ids"], run.tensors["text/attention_mask"].bool()
    cut = int(run.tensors.get("prompt_length", torch.zeros(1)))
    return Stage2Batch(image, ids[:, :cut], mask[:, :cut], ids[:, cut:], mask[:, cut:], keys)


def _load(model: Any, run: LavisRun) -> Any:
    state = run.ours("state_dict")
    model.to(state["qformer.query_tokens"].dtype).load_state_dict(state)
    return model


def vision_encoder(args: Mapping[str, Any], weights: str | None = None) -> NormalisedImages:
    """LAVIS's EVA or CLIP tower in timm, at the recorded sizes; random weights if none are given."""
    model_args = {
        "patch_size": args["patch"],
        "embed_dim": args["vit_width"],
        "depth": args["vit_depth"],
        "num_heads": args["vit_heads"],
        "mlp_ratio": args["vit_mlp"] / args["vit_width"],
    }
    image = ImageSpec(args["img"], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    name = TOWERS[args.get("vit", "eva_clip_g")]
    return NormalisedImages(TimmVisionEncoder(name, image, layer=-1, weights=weights, model_args=model_args))


def _qformer(run: LavisRun) -> QFormer:
    args, state = run.facts["args"], run.tensors
    crossing = [layer for layer in range(args["q_layers"]) if _key_of(layer) in state]
    words = state.get("state_dict/Qformer.bert.embeddings.word_embeddings.weight")
    positions = state.get("state_dict/Qformer.bert.embeddings.position_embeddings.weight")
    return QFormer(
        hidden_size=args["q_width"],
        num_layers=args["q_layers"],
        num_heads=args["q_heads"],
        num_queries=args["queries"],
        cross_attention_every=crossing[1] if len(crossing) > 1 else args["q_layers"],
        image_dim=args["vit_width"],
        vocab_size=args["vocab"] + 1 if words is None else len(words),
        intermediate_size=args["q_mlp"],
        max_positions=512 if positions is None else len(positions),
        dropout=args["dropout"],
    )


def _key_of(layer: int) -> str:
    return f"state_dict/Qformer.bert.encoder.layer.{layer}.crossattention.self.key.weight"
