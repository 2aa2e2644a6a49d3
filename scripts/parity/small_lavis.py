"""LAVIS's BLIP-2 models at sizes of one's choice, with random weights and without the network.

Runs in the environment of `lavis_environment.sh`. LAVIS takes BERT and the LLM from folders written here; replaced are
`create_eva_vit_g` and `create_clip_vit_L`, whose sizes are literals: their classes are called with other numbers.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lavis_source as lavis
import torch
from model_folders import BERT, write_bert, write_opt, write_t5
from torch import nn
from transformers import BertConfig, BertForMaskedLM

NOISE = 0.05
"""Added to every weight, so that no LayerNorm is the identity and no bias is zero."""


def build(args: Namespace) -> nn.Module:
    """Write the folders into the current directory and let LAVIS build its model from them.

    Args:
        args: see `record_lavis.py`; `kind` is "stage1", "stage2_opt" or "stage2_t5".

    Returns:
        The model in `args.dtype`, in training mode, every weight random.
    """
    torch.manual_seed(args.seed)
    _write_bert(args)
    lavis.blip2.create_eva_vit_g = functools.partial(_small_eva, args)
    lavis.blip2.create_clip_vit_L = functools.partial(_small_clip, args)
    sizes = {
        "vit_model": args.vit,
        "img_size": args.img,
        "vit_precision": "fp32",
        "num_query_token": args.queries,
        "max_txt_len": args.max_txt,
    }
    builders: dict[str, Callable[[Namespace, dict[str, Any]], nn.Module]] = {
        "stage1": _stage1,
        "stage2_opt": _stage2_opt,
        "stage2_t5": _stage2_t5,
    }
    model = builders[args.kind](args, sizes)
    dtype = getattr(torch, args.dtype)
    if dtype == torch.float64:
        for module in (lavis.blip2, lavis.clip_vit):  # LAVIS's casts to float32, against half precision
            module.LayerNorm.forward = nn.LayerNorm.forward
    model = model.to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))
        if args.kind == "stage1":
            model.temp.fill_(args.temperature)
    return model


def _stage1(args: Namespace, sizes: dict[str, Any]) -> nn.Module:
    return lavis.blip2_qformer.Blip2Qformer(
        **sizes, cross_attention_freq=args.cross_attention_every, embed_dim=args.embed_dim
    )


def _stage2_opt(args: Namespace, sizes: dict[str, Any]) -> nn.Module:
    config = {
        "hidden_size": args.lm_width, "word_embed_proj_dim": args.lm_width, "ffn_dim": 2 * args.lm_width,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 42, "max_position_embeddings": 48,
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "dropout": 0.0, "attention_dropout": 0.0,
        "init_std": 0.2,
    }  # fmt: skip
    write_opt(Path("opt"), config)
    _save_weights(lavis.blip2_opt.OPTForCausalLM, Path("opt"))
    return lavis.blip2_opt.Blip2OPT(**sizes, opt_model="opt", prompt=args.prompt)


def _stage2_t5(args: Namespace, sizes: dict[str, Any]) -> nn.Module:
    config = {
        "d_model": args.lm_width, "d_kv": args.lm_width // 4, "d_ff": 2 * args.lm_width, "num_layers": 1,
        "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 30, "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "tie_word_embeddings": False,
        "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "dropout_rate": 0.0,
    }  # fmt: skip
    write_t5(Path("t5"), config, words=30)
    _save_weights(lavis.blip2_t5.T5ForConditionalGeneration, Path("t5"))
    return lavis.blip2_t5.Blip2T5(**sizes, t5_model="t5")


def _write_bert(args: Namespace) -> None:
    config = {
        "hidden_size": args.q_width, "num_hidden_layers": args.q_layers, "num_attention_heads": args.q_heads,
        "intermediate_size": args.q_mlp, "max_position_embeddings": args.max_positions, "pad_token_id": 0,
        "hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.dropout, "initializer_range": 0.1,
    }  # fmt: skip
    write_bert(Path(BERT), config, args.vocab)
    torch.save(BertForMaskedLM(BertConfig.from_pretrained(BERT)).state_dict(), f"{BERT}/pytorch_model.bin")


def _save_weights(cls: Any, folder: Path) -> None:
    torch.save(cls(cls.config_class.from_pretrained(folder)).state_dict(), folder / "pytorch_model.bin")


def _small_eva(
    args: Namespace, img_size: int, drop_path_rate: float, use_checkpoint: bool, precision: str
) -> nn.Module:
    """As `create_eva_vit_g`, with the sizes of `args` and no download."""
    return lavis.eva_vit.VisionTransformer(
        img_size=img_size,
        patch_size=args.patch,
        use_mean_pooling=False,
        embed_dim=args.vit_width,
        depth=args.vit_depth,
        num_heads=args.vit_heads,
        mlp_ratio=args.vit_mlp / args.vit_width,
        qkv_bias=True,
        drop_path_rate=drop_path_rate,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        use_checkpoint=use_checkpoint,
    )


def _small_clip(args: Namespace, img_size: int, use_checkpoint: bool, precision: str) -> nn.Module:
    """As `create_clip_vit_L`: it builds one layer less than it is told, and the inner width is four times `width`."""
    return lavis.clip_vit.VisionTransformer(
        input_resolution=img_size,
        patch_size=args.patch,
        width=args.vit_width,
        layers=args.vit_depth + 1,
        heads=args.vit_heads,
        use_grad_checkpointing=use_checkpoint,
    )
