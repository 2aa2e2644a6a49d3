"""Tensors of a foreign checkpoint against the model that a config describes, before anything is written.

A size that differs is named with the setting that makes it fit: the sizes of BLIP-2's parts (paper, section 3.1) all
show in its tensors. LAVIS loads whatever has the right name and leaves the rest at random.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from blip2train.errors import CheckpointError
from blip2train.model.freezing import trainable_state_dict

Shapes = Mapping[str, tuple[int, ...]]

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")

# setting -> the tensor and the dimension that show it
_VISIBLE = {
    "model.qformer.num_queries": ("qformer.query_tokens", 1),
    "model.qformer.hidden_size": ("qformer.query_tokens", 2),
    "model.qformer.intermediate_size": ("qformer.blocks.0.query_ffn.expand.bias", 0),
    "model.qformer.vocab_size (tokenizer.vocab_size)": ("qformer.text_embeddings.word.weight", 0),
    "model.qformer.max_positions": ("qformer.text_embeddings.position.weight", 0),
    "model.qformer.image_dim (model.vision_encoder.embed_dim)": ("qformer.blocks.0.cross_attention.key.weight", 1),
    "model.contrastive_dim": ("vision_proj.bias", 0),
    "the language model's width (model/language_model)": ("projection.bias", 0),
}


SET_SIZES = "set them as the file has them, or choose the experiment= that this file belongs to"


def check_sizes(state: Mapping[str, Tensor], model: nn.Module, *, where: str, fix: str = SET_SIZES) -> None:
    """Compare the sizes that trained tensors show with those of the model they are for.

    Args:
        state: trained tensors by our names.
        model: as the config describes it; on the meta device is enough.
        where: the source, for the error.
        fix: what the user can do about it.

    Raises:
        CheckpointError: one that differs; lists all of them by setting.
    """
    found, wanted = _sizes(_shapes(state)), _sizes(_shapes(trainable_state_dict(model)))
    different = [
        f"{setting}: the file has {value}, the config {wanted[setting]}"
        for setting, value in found.items()
        if setting in wanted and wanted[setting] != value
    ]
    if different:
        raise CheckpointError(
            f"{len(different)} sizes differ from the config's:\n    " + "\n    ".join(different),
            where=where,
            fix=fix,
        )


def check_vision(vision: Mapping[str, Tensor], model: nn.Module, *, where: str) -> None:
    """Compare a whole vision encoder, by timm's names, with the model's; nothing to do where the source has none.

    Raises:
        CheckpointError: another image size, other blocks, or a name or shape that differs.
    """
    if not vision:
        return
    found, wanted = _shapes(vision), _shapes(model.get_submodule("vision_encoder.backbone").state_dict())
    problems = {
        _image_size: "images of {} tokens in the file, {} in the config: set model.vision_encoder.image.size",
        _num_blocks: "{} blocks in the file, {} in the config: set model.vision_encoder.layer to the last one's number",
    }
    for measure, message in problems.items():
        if measure(found) != measure(wanted):
            raise CheckpointError(
                f"another vision encoder: {message.format(measure(found), measure(wanted))}",
                where=where,
                fix=_fix_vision(found),
            )
    _check_names(found, wanted, "the vision encoder", where)


def check_language_model(language_model: Mapping[str, Tensor], model: nn.Module, *, where: str) -> None:
    """Check that a language model, by transformers' names, is whole; nothing to do where the source has none.

    Raises:
        CheckpointError: part of it is missing, or it is another one.
    """
    if not language_model:
        return
    whole = model.get_submodule("language_model.model")
    tied = set(whole.state_dict()) - {name for name, _ in whole.named_parameters()}
    found, wanted = _shapes(language_model), _shapes(whole.state_dict())
    _check_names(
        found,
        {name: shape for name, shape in wanted.items() if name not in tied or name in found},
        "the language model",
        where,
    )


def _sizes(shapes: Shapes) -> dict[str, int]:
    sizes = {setting: shapes[name][axis] for setting, (name, axis) in _VISIBLE.items() if name in shapes}
    crossing = sorted({_block(name) for name in shapes if ".cross_attention." in name})
    qformer = {name: shape for name, shape in shapes.items() if name.startswith("qformer.blocks.")}
    sizes["model.qformer.num_layers"] = _num_blocks(qformer)
    if len(crossing) > 1:
        sizes["model.qformer.cross_attention_every"] = crossing[1] - crossing[0]
    return sizes


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _block(name: str) -> int:
    found = _BLOCK.search(name)
    return int(found[1]) if found else -1


def _num_blocks(shapes: Shapes) -> int:
    return 1 + max((_block(name) for name in shapes), default=-1)


def _image_size(shapes: Shapes) -> int:
    return shapes["pos_embed"][1] if "pos_embed" in shapes else 0


def _fix_vision(found: Shapes) -> str:
    patch, tokens = found.get("patch_embed.proj.weight", (0, 0, 0, 0))[-1], _image_size(found)
    size = patch * math.isqrt(max(tokens - 1, 0))
    return f"model.vision_encoder.image.size={size} model.vision_encoder.layer={_num_blocks(found) - 1} fit this file"


def _check_names(found: Shapes, wanted: Shapes, part: str, where: str) -> None:
    rows: tuple[tuple[str, Callable[[str], bool]], ...] = (
        ("missing", lambda name: name not in found),
        ("unknown", lambda name: name not in wanted),
        ("of another shape", lambda name: name in found and name in wanted and found[name] != wanted[name]),
    )
    listed = {fate: [name for name in {**wanted, **found} if true(name)] for fate, true in rows}
    problems = [f"{len(names)} {fate} ({', '.join(names[:4])})" for fate, names in listed.items() if names]
    if problems:
        raise CheckpointError(
            f"{part} in the file is not the config's: {'; '.join(problems)}",
            where=where,
            fix="choose the model/vision_encoder= or model/language_model= that this file was made with",
        )
