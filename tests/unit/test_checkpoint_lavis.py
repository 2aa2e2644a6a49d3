"""The LAVIS table against what LAVIS's real classes save (tests/data/lavis_keys), and our models at full size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lavis_parity import TIED, our_name
from torch import Tensor

from blip2train.checkpoint.lavis import LEFT_OVER, LavisModel, from_lavis, to_lavis
from blip2train.checkpoint.size_check import check_sizes, check_vision
from blip2train.cli.config import compose
from blip2train.cli.meta import build_meta
from blip2train.errors import CheckpointError
from blip2train.model.freezing import trainable_state_dict

KEYS = Path(__file__).resolve().parents[1] / "data" / "lavis_keys"
# kind of file -> its key sets, the experiment that describes it, and what differs from that experiment
FILES = {
    "blip2_pretrained": (["stage1_vitg"], "paper/stage1_vitg", []),
    "blip2_pretrained_vitL": (["stage1_vitl"], "paper/stage1_vitl", []),
    "blip2_pretrained_opt2.7b": (["stage2_vitg_opt_2_7b"], "paper/stage2_vitg_opt_2_7b", []),
    "blip2_pretrained_flant5xl": (["stage2_vitg_flan_t5_xl"], "paper/stage2_vitg_flan_t5_xl", []),
    "blip2_caption_opt2.7b": (["stage2_vitg_opt_2_7b", "visual_encoder_vitg"], "paper/stage2_vitg_opt_2_7b", []),
    "blip2_finetune_coco": (["stage1_vitg", "visual_encoder_vitg"], "paper/stage1_vitg", []),
    # LAVIS 1.0.2 keeps 21 of CLIP's 24 blocks
    "retrieval_vitL": (["stage1_vitl", "visual_encoder_vitl"], "paper/stage1_vitl", ["model.vision_encoder.layer=20"]),
}  # fmt: skip


def load_state(names: list[str]) -> dict[str, Tensor]:
    """Tensors of a file's names and shapes without their memory, each of another value."""
    shapes = {key: shape for name in names for key, shape in json.loads((KEYS / f"{name}.json").read_text()).items()}
    state = {key: torch.tensor(float(number)).expand(shape) for number, (key, shape) in enumerate(shapes.items())}
    for second, first in (("decoder.weight", "word_embeddings.weight"), ("decoder.bias", "predictions.bias")):
        for key in state:
            if key.endswith(f"predictions.{second}"):
                state[key] = next(tensor for name, tensor in state.items() if name.endswith(first))
    ids = "Qformer.bert.embeddings.position_ids"
    return state | ({ids: torch.arange(shapes[ids][1])[None]} if ids in shapes else {})


@pytest.fixture(params=FILES, scope="module")
def file(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], str, list[str]]:
    names, experiment, overrides = FILES[request.param]
    return load_state(names), experiment, overrides


def test_in_and_out_again_is_the_identity(file: tuple[dict[str, Tensor], str, list[str]]) -> None:
    state = file[0]
    back = to_lavis(from_lavis(state, where="file"), max_positions=512, where="run")
    assert list(back) == list(state)
    assert all(back[name].dtype == tensor.dtype and torch.equal(back[name], tensor) for name, tensor in state.items())


def test_names_are_those_of_the_hand_written_table(file: tuple[dict[str, Tensor], str, list[str]]) -> None:
    state = {name: tensor for name, tensor in file[0].items() if not name.startswith("visual_encoder.")}
    state = {name: tensor for name, tensor in state.items() if not LEFT_OVER.fullmatch(name) and name not in TIED}
    ours = from_lavis(file[0], where="file").model.state
    assert {name: float(tensor.flatten()[0]) for name, tensor in ours.items()} == {
        our_name(name.replace("t5_proj", "opt_proj")): float(tensor.flatten()[0]) for name, tensor in state.items()
    }


def test_what_comes_out_is_our_model_at_full_size(file: tuple[dict[str, Tensor], str, list[str]]) -> None:
    state, experiment, overrides = file
    parts = from_lavis(state, where="file")
    model = build_meta(compose("train", [f"experiment={experiment}", *overrides]))
    trained = {name: tensor.shape for name, tensor in trainable_state_dict(model).items()}
    assert {name: tensor.shape for name, tensor in parts.model.state.items()} == trained
    check_sizes(parts.model.state, model, where="file")
    check_vision(parts.model.vision, model, where="file")


def test_a_model_of_ours_takes_the_names_of_lavis_file(file: tuple[dict[str, Tensor], str, list[str]]) -> None:
    state = file[0]
    parts = from_lavis(state, where="file")
    parts.model.facts = {}  # as of a run that never came from LAVIS
    saved = {name: tensor.shape for name, tensor in to_lavis(parts, max_positions=512, where="run").items()}
    assert saved == {name: tensor.shape for name, tensor in state.items() if not LEFT_OVER.fullmatch(name)}


def test_an_encoder_of_another_image_size_is_named_with_the_size_that_fits() -> None:
    vision = from_lavis(load_state(["visual_encoder_vitg"]), where="file").model.vision
    model = build_meta(compose("train", ["experiment=paper/stage1_vitg", "model.vision_encoder.image.size=364"]))
    with pytest.raises(CheckpointError, match=r"257 tokens in the file, 677 in the config(.|\n)*image.size=224"):
        check_vision(vision, model, where="file")


def test_clip_blocks_that_lavis_does_not_build_are_named_with_the_layer_that_fits() -> None:
    vision = from_lavis(load_state(["visual_encoder_vitl"]), where="file").model.vision
    model = build_meta(compose("train", ["experiment=paper/stage1_vitl"]))
    with pytest.raises(CheckpointError, match=r"21 blocks in the file, 23 in the config(.|\n)*layer=20"):
        check_vision(vision, model, where="file")


def test_clip_encoder_computes_what_lavis_names_say() -> None:
    """OpenAI's own layout, which LAVIS's CLIP keeps, is read by timm too: both ways must give the same tensors."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    small = {"embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 0}
    network = timm.create_model("vit_large_patch14_clip_quickgelu_224", **small).eval()
    theirs = {
        "class_embedding": (64,),
        "positional_embedding": (257, 64),
        "conv1.weight": (64, 3, 14, 14),
        "ln_pre.weight": (64,),
        "ln_pre.bias": (64,),
    }
    for layer in range(2):
        for name, shape in {
            "ln_1.weight": (64,), "ln_1.bias": (64,), "ln_2.weight": (64,), "ln_2.bias": (64,),
            "attn.in_proj_weight": (192, 64), "attn.in_proj_bias": (192,),
            "attn.out_proj.weight": (64, 64), "attn.out_proj.bias": (64,),
            "mlp.c_fc.weight": (256, 64), "mlp.c_fc.bias": (256,),
            "mlp.c_proj.weight": (64, 256), "mlp.c_proj.bias": (64,),
        }.items():  # fmt: skip
            theirs[f"transformer.resblocks.{layer}.{name}"] = shape
    state = {f"visual_encoder.{name}": torch.randn(shape) for name, shape in theirs.items()}
    ours = from_lavis(state, where="file").model.vision
    openai = {name.replace("visual_encoder.", "visual."): tensor for name, tensor in state.items()}
    norm_post = {"visual.ln_post.weight": torch.ones(64), "visual.ln_post.bias": torch.zeros(64)}
    timms = checkpoint_filter_fn(openai | norm_post, network)
    kept = {name: tensor for name, tensor in timms.items() if not name.startswith(("norm.", "head."))}
    assert set(ours) == set(kept)
    assert all(torch.equal(ours[name], tensor) for name, tensor in kept.items())


def test_vicuna_projection_is_read_and_two_projections_are_refused() -> None:
    state = load_state(["stage2_vitg_flan_t5_xl"])
    vicuna = {name.replace("t5_proj", "llm_proj"): tensor for name, tensor in state.items() if "t5_model" not in name}
    parts = from_lavis(vicuna, where="file")
    assert parts.kind == "llm" and "projection.weight" in parts.model.state
    with pytest.raises(CheckpointError, match="llm_proj.weight"):
        from_lavis(state | vicuna, where="file")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("Qformer.cls.predictions.decoder.weight", torch.tensor(-1.0).expand(30523, 768), "not what they repeat"),
        ("Qformer.bert.embeddings.position_ids", torch.arange(1, 513)[None], "not what they repeat"),
        ("temp", torch.tensor(0.07, dtype=torch.float64), "temp .torch.float64"),
        ("temp", 0.07, "temp .float"),
        ("Qformer.bert.pooler.dense.bias", torch.zeros(2), "Qformer.bert.pooler.dense.bias"),
    ],
)
def test_what_cannot_be_kept_is_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_lavis(load_state(["stage1_vitg"]) | {name: value}, where="file")  # type: ignore[dict-item]


def test_a_saved_wrapper_is_called_one() -> None:
    state = {f"module.{name}": tensor for name, tensor in load_state(["stage1_vitg"]).items()}
    with pytest.raises(CheckpointError, match=r"every name starts with 'module\.'(.|\n)*removeprefix"):
        from_lavis(state, where="file")


def test_a_name_without_a_place_is_named_before_a_number_format() -> None:
    state = load_state(["stage1_vitg"]) | {"head.weight": torch.zeros(2), "head.steps": torch.zeros(2).long()}
    with pytest.raises(CheckpointError, match=r"2 of \d+ tensors have no place(.|\n)*head.weight\n    head.steps"):
        from_lavis(state, where="file")


def test_a_lost_part_is_noticed_on_the_way_back() -> None:
    parts = from_lavis(load_state(["stage2_vitg_opt_2_7b"]), where="file")
    lost = LavisModel(parts.model, kind=parts.kind)
    lost.model.extra = {}
    with pytest.raises(CheckpointError, match="no longer here: opt_model.lm_head.weight"):
        to_lavis(lost, max_positions=512, where="run")
