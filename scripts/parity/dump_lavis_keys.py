"""Names and shapes of what LAVIS saves at the paper's sizes: `python dump_lavis_keys.py FOLDER`.

Runs in the environment of `lavis_environment.sh`. The real classes are built on the meta device with the real sizes (no
weights, no network), then `state_dict()` is filtered by the rule of LAVIS's runner: named parameters without gradient
go, buffers and second names of tied weights stay. Writes {name: shape} per model.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lavis_source as lavis
import torch
from model_folders import BERT, write_bert, write_opt, write_t5
from torch import nn

# google-bert/bert-base-uncased's config.json, without its vocabulary size (30522)
BERT_BASE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu", "pad_token_id": 0,
}  # fmt: skip
# facebook/opt-2.7b
OPT_2_7B = {
    "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 10240, "vocab_size": 50272,
    "max_position_embeddings": 2048, "word_embed_proj_dim": 2560, "do_layer_norm_before": True,
    "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
# google/flan-t5-xl
FLAN_T5_XL = {
    "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32,
    "vocab_size": 32128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def main(target: Path) -> None:
    target = target.resolve()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_bert(Path(BERT), BERT_BASE, vocab=30522)
        write_opt(Path("opt"), OPT_2_7B)
        write_t5(Path("t5"), FLAN_T5_XL, words=50)
        torch.save({}, "empty.pth")
        models: dict[str, Callable[[], nn.Module]] = {
            "stage1_vitg": lavis.blip2_qformer.Blip2Qformer,
            "stage1_vitl": functools.partial(lavis.blip2_qformer.Blip2Qformer, vit_model="clip_L"),
            "stage2_vitg_opt_2_7b": functools.partial(lavis.blip2_opt.Blip2OPT, opt_model="opt"),
            "stage2_vitg_flan_t5_xl": functools.partial(lavis.blip2_t5.Blip2T5, t5_model="t5"),
        }
        for name, build in models.items():
            with _on_meta():
                model = build()
            write(target / f"{name}.json", saved_shapes(model))
            if name.startswith("stage1_"):  # files fine-tuned with the encoder hold it too
                vision = {f"visual_encoder.{key}": value for key, value in shapes(model.visual_encoder).items()}
                write(target / f"{name.replace('stage1', 'visual_encoder')}.json", vision)
        os.chdir(target)


@contextmanager
def _on_meta() -> Iterator[None]:
    """Sizes only: parameters on the meta device, weight files empty, pre-trained models built from their config."""
    linspace = torch.linspace
    downloaded = (lavis.eva_vit.download_cached_file, lavis.clip_vit.download_cached_file)
    classes = (
        lavis.Qformer.BertLMHeadModel,
        lavis.blip2_opt.OPTForCausalLM,
        lavis.blip2_t5.T5ForConditionalGeneration,
    )
    torch.linspace = functools.partial(linspace, device="cpu")  # LAVIS reads the drop path rates with .item()
    lavis.eva_vit.download_cached_file = lavis.clip_vit.download_cached_file = lambda *_, **__: "empty.pth"
    for cls in classes:
        cls.from_pretrained = classmethod(_from_config)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.linspace = linspace
        lavis.eva_vit.download_cached_file, lavis.clip_vit.download_cached_file = downloaded
        for cls in classes:
            del cls.from_pretrained


def _from_config(cls: Any, source: str, config: Any = None, **_: Any) -> nn.Module:
    return cls(config if config is not None else cls.config_class.from_pretrained(source))


def saved_shapes(model: nn.Module) -> dict[str, list[int]]:
    """What `RunnerBase._save_checkpoint` keeps of a model."""
    gradient = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return {name: shape for name, shape in shapes(model).items() if gradient.get(name, True)}


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def write(path: Path, content: dict[str, list[int]]) -> None:
    lines = [f"{json.dumps(name)}:{json.dumps(shape, separators=(',', ':'))}" for name, shape in content.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path.name}: {len(content)} tensors, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
