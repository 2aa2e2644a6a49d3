"""Models of ours holding the weights of a recorded LAVIS run, and LAVIS's tensors under our parameter names.

The recordings (`lavis_numerics`) come from unmodified LAVIS; the rename table is written from its state dict's names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from blip2train.batch import ImageSpec
from blip2train.model.blip2_stage1 import Blip2Stage1
from blip2train.model.blip2_stage2 import Blip2Stage2
from blip2train.model.language_model.decoder_only import DecoderOnly
from blip2train.model.qformer.qformer import QFormer
from blip2train.model.vision_encoder.timm_vit import TimmVisionEncoder

_LAYER = r"Qformer\.bert\.encoder\.layer\.(\d+)\."
RENAMES = [
    (r"temp", r"temperature"),
    (r"query_tokens", r"qformer.query_tokens"),
    (r"(ln_vision|vision_proj|text_proj|itm_head)\.(.*)", r"\1.\2"),
    (r"opt_proj\.(.*)", r"projection.\1"),
    (r"opt_model\.(.*)", r"language_model.model.\1"),
    (r"visual_encoder\.(.*)", r"vision_encoder.encoder.backbone.\1"),
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
        prefix = f"{group}/"
        return rename({key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)})


class NormalisedImages(nn.Module):
    """A vision encoder for images that LAVIS has already normalised: float (B, 3, h, w) in."""

    def __init__(self, encoder: TimmVisionEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.image, self.embed_dim, self.num_tokens = encoder.image, encoder.embed_dim, encoder.num_tokens
        self.trainable = encoder.trainable

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder.backbone.forward_features(pixel_values)


def load_run(shared_data: Path, name: str) -> LavisRun:
    """Read one of "stage1_six_captions", "stage1_two_ranks", "stage2_opt"."""
    folder = shared_data / "lavis_numerics"
    return LavisRun(json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors"))


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate LAVIS's names to ours; every name is translated or listed in TIED."""
    return {our_name(key): tensor for key, tensor in state.items() if key not in TIED}


def our_name(key: str) -> str:
    for pattern, replacement in RENAMES:
        found = re.fullmatch(pattern, key)
        if found:
            return found.expand(replacement)
    raise KeyError(f"no rename for {key}")


def build_stage1(run: LavisRun) -> Blip2Stage1:
    """Our stage 1 with the recorded weights; its vision encoder takes normalised float images."""
    model = Blip2Stage1(_vision_encoder(run.facts["args"]), _qformer(run), run.facts["args"]["embed_dim"])
    model.load_state_dict(run.ours("state_dict"))
    return model


def build_stage2(run: LavisRun) -> Blip2Stage2:
    """Our stage 2 with the recorded weights and its OPT."""
    opt = DecoderOnly({key: value for key, value in run.facts["lm_config"].items() if key in OPT_FIELDS})
    model = Blip2Stage2(_vision_encoder(run.facts["args"]), _qformer(run), opt)
    model.load_state_dict(run.ours("state_dict"))
    return model


OPT_FIELDS = {
    "model_type", "vocab_size", "max_position_embeddings", "num_attention_heads", "word_embed_proj_dim", "ffn_dim",
    "hidden_size", "num_hidden_layers", "dropout", "attention_dropout", "activation_function", "do_layer_norm_before",
    "bos_token_id", "pad_token_id", "eos_token_id",
}  # fmt: skip


def _vision_encoder(args: Mapping[str, Any]) -> NormalisedImages:
    model_args = {
        "patch_size": args["patch"],
        "embed_dim": args["vit_width"],
        "depth": args["vit_depth"],
        "num_heads": args["vit_heads"],
        "mlp_ratio": args["vit_mlp"] / args["vit_width"],
    }
    image = ImageSpec(args["img"], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return NormalisedImages(TimmVisionEncoder("eva_giant_patch14_clip_224", image, layer=-1, model_args=model_args))


def _qformer(run: LavisRun) -> QFormer:
    args = run.facts["args"]
    return QFormer(
        hidden_size=args["q_width"],
        num_layers=args["q_layers"],
        num_heads=args["q_heads"],
        num_queries=args["queries"],
        cross_attention_every=2,
        image_dim=args["vit_width"],
        vocab_size=args["vocab"] + 1,
        intermediate_size=args["q_mlp"],
        max_positions=512,
        dropout=args["dropout"],
    )
