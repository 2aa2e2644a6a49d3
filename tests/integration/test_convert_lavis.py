"""LAVIS files through the convert command: the recorded weights compute LAVIS's numbers and go back bit by bit.

The recordings (tests/lavis_parity.py) were made by unmodified LAVIS; they are saved here as LAVIS saves a checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis_comparison import assert_close_to, assert_stage1_step, stage2_step
from lavis_parity import LavisRun, NormalisedImages, shared_run
from torch import Tensor

from blip2train.checkpoint.find import find_checkpoint
from blip2train.checkpoint.io import WEIGHTS, read_metadata, read_weights, save_weights
from blip2train.cli.config import compose
from blip2train.cli.convert import convert
from blip2train.cli.evaluate import load_model, load_run_config
from blip2train.errors import CheckpointError, ConfigError
from blip2train.run_dir import RunDir, read_json


def run_convert(*overrides: str) -> None:
    convert(compose("convert", list(overrides)))


def described(run: LavisRun, stage: int) -> list[str]:
    """The recorded model as a user describes it: an experiment, and what differs from it."""
    args = run.facts["args"]
    vision = {"patch_size": args["patch"], "embed_dim": args["vit_width"], "depth": args["vit_depth"]}
    vision |= {"num_heads": args["vit_heads"], "mlp_ratio": args["vit_mlp"] / args["vit_width"]}
    values = {
        "vision_encoder.pretrained": False,
        "vision_encoder.dtype": "float32",
        "vision_encoder.layer": -1,
        "vision_encoder.embed_dim": args["vit_width"],
        "vision_encoder.image.size": args["img"],
        "qformer.hidden_size": args["q_width"],
        "qformer.num_layers": args["q_layers"],
        "qformer.num_heads": args["q_heads"],
        "qformer.intermediate_size": args["q_mlp"],
        "qformer.num_queries": args["queries"],
        "qformer.vocab_size": args["vocab"] + 1,
        "qformer.max_positions": 512,
    }
    experiment = "microworld_stage1" if stage == 1 else "microworld_stage2_opt"
    overrides = [f"experiment={experiment}", "model/vision_encoder=eva_clip_g"]
    overrides += [f"model.{key}={value}" for key, value in values.items()]
    overrides += [f"+model.vision_encoder.model_args.{key}={value}" for key, value in vision.items()]
    if stage == 1:
        return [*overrides, f"model.contrastive_dim={args['embed_dim']}"]
    return overrides


def state_of(run: LavisRun) -> dict[str, Tensor]:
    prefix = "state_dict/"
    return {key.removeprefix(prefix): tensor for key, tensor in run.tensors.items() if key.startswith(prefix)}


def trained_only(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What LAVIS's epoch runner saves: frozen parameters removed."""
    return {key: tensor for key, tensor in state.items() if not key.startswith(("visual_encoder.", "opt_model."))}


def assert_same_file(found: Path, expected: dict[str, Tensor]) -> None:
    state = torch.load(found, weights_only=True)["model"]
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and state[name].shape == tensor.shape, name
        assert torch.equal(state[name], tensor), name


@pytest.fixture(scope="module")
def stage1(shared_data: Path) -> LavisRun:
    return shared_run(shared_data, "stage1_six_captions")


def test_a_whole_stage1_file_gives_lavis_losses_and_gradients_and_goes_back_bit_by_bit(
    stage1: LavisRun, tmp_path: Path
) -> None:
    state = state_of(stage1)
    torch.save({"model": state, "optimizer": {}, "config": {"run": {"seed": 42}}, "scaler": None, "iters": 300},
               tmp_path / "checkpoint_300.pth")  # fmt: skip
    run_convert("from=lavis", "to=blip2train", f"source={tmp_path}/checkpoint_300.pth", f"target={tmp_path}/ours",
                *described(stage1, 1))  # fmt: skip
    (tmp_path / "ours").rename(tmp_path / "moved")  # a run folder may move
    run = RunDir.open(tmp_path / "moved")
    model: Any = load_model(load_run_config(run), run)
    model.vision_encoder = NormalisedImages(model.vision_encoder)  # the recording's images are normalised already
    assert_stage1_step(model, stage1)
    assert torch.equal(model.temperature, state["temp"])
    checkpoint = find_checkpoint(run)
    assert checkpoint.name == "step-0000300" and read_metadata(checkpoint)["step"] == 300
    assert read_json(run.path / "parts" / "extra.json")["beside"]["config"] == {"run": {"seed": 42}}
    run_convert("from=blip2train", "to=lavis", f"source={tmp_path}/moved", f"target={tmp_path}/back")
    assert_same_file(tmp_path / "back" / "model.pth", state)
    report = read_json(run.path / "conversion.json")
    assert report["parts"]["vision encoder"] == sum(name.startswith("visual_encoder.") for name in state)
    assert any(item.startswith("optimizer") for item in report["not_held"])


def test_a_stage1_file_in_half_precision_goes_back_bit_by_bit(stage1: LavisRun, tmp_path: Path) -> None:
    state = {name: tensor.half() if tensor.is_floating_point() else tensor
             for name, tensor in trained_only(state_of(stage1)).items()}  # fmt: skip
    torch.save({"model": state}, tmp_path / "half.pth")
    run_convert("from=lavis", "to=blip2train", f"source={tmp_path}/half.pth", f"target={tmp_path}/ours",
                *described(stage1, 1))  # fmt: skip
    run_convert("from=blip2train", "to=lavis", f"source={tmp_path}/ours", f"target={tmp_path}/back.pth")
    assert_same_file(tmp_path / "back.pth", state)
    assert (tmp_path / "back.conversion.json").is_file()


def test_a_stage2_file_with_its_language_model_gives_lavis_loss_and_goes_back(
    shared_data: Path, tmp_path: Path
) -> None:
    recorded = shared_run(shared_data, "stage2_opt")
    state = state_of(recorded)
    torch.save({"model": state}, tmp_path / "whole.pth")
    lm = recorded.facts["lm_config"]
    shape = ["vocab_size", "hidden_size", "word_embed_proj_dim", "num_hidden_layers", "num_attention_heads", "ffn_dim",
             "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"]  # fmt: skip
    llm = [f"llm.architecture.{key}={lm[key]}" for key in shape]
    run_convert("from=lavis", "to=blip2train", f"source={tmp_path}/whole.pth", f"target={tmp_path}/ours",
                "llm.path=opt-of-the-recording", *llm, *described(recorded, 2))  # fmt: skip
    run = RunDir.open(tmp_path / "ours")
    model: Any = load_model(load_run_config(run), run)
    model.vision_encoder = NormalisedImages(model.vision_encoder)
    loss, gradients = stage2_step(model, recorded)
    assert loss == pytest.approx(recorded.facts["loss"], rel=1e-5)
    assert_close_to(gradients, recorded.ours("grads"), relative=1e-5)
    run_convert("from=blip2train", "to=lavis", f"source={tmp_path}/ours", f"target={tmp_path}/back")
    assert_same_file(tmp_path / "back" / "model.pth", state)


def test_stage2_leftovers_of_text_and_language_model_are_kept_for_the_way_back(
    shared_data: Path, stage1: LavisRun, tmp_path: Path
) -> None:
    recorded = shared_run(shared_data, "stage2_opt")
    whole = state_of(recorded)
    state = trained_only(whole) | {"opt_model.lm_head.weight": whole["opt_model.lm_head.weight"].half()}
    text = "Qformer.bert.encoder.layer.1.intermediate.dense.weight"
    state |= {text: state_of(stage1)[text], "temp": torch.tensor(0.05)}
    torch.save({"model": state, "epoch": 3}, tmp_path / "file.pth")
    run_convert("from=lavis", "to=blip2train", f"source={tmp_path}/file.pth", f"target={tmp_path}/ours",
                *described(recorded, 2), "model/language_model=tiny_opt", "llm.architecture.hidden_size=64",
                "llm.architecture.word_embed_proj_dim=64", "llm.path=opt-64")  # fmt: skip
    kept = read_json(tmp_path / "ours" / "conversion.json")["kept_aside"]
    assert set(kept) == {"opt_model.lm_head.weight", text, "temp"}
    assert not (tmp_path / "ours" / "parts" / "language_model").exists()
    run_convert("from=blip2train", "to=lavis", f"source={tmp_path}/ours", f"target={tmp_path}/back")
    assert_same_file(tmp_path / "back" / "model.pth", state)


class Sentinel:
    """Pickled code: whoever unpickles it creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def save_archive(content: object, path: Path) -> None:
    torch.save(content, path)


def save_as_before_torch_1_6(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [save_archive, save_as_before_torch_1_6, save_pickle])
def test_code_in_a_pickle_is_refused_and_does_not_run(
    stage1: LavisRun, tmp_path: Path, save: Callable[[object, Path], None]
) -> None:
    save({"config": Sentinel(tmp_path / "ran"), "model": trained_only(state_of(stage1))}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"a pickle that calls \w+\.mkdir; no code of it was run"):
        run_convert("from=lavis", "to=blip2train", f"source={tmp_path}/bad.pth", f"target={tmp_path}/ours",
                    *described(stage1, 1))  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pth"]
    pickle.loads(pickle.dumps(Sentinel(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()  # the file does hold code: an unsafe reader runs it


def test_a_file_of_before_torch_1_6_is_read(stage1: LavisRun, tmp_path: Path) -> None:
    state = trained_only(state_of(stage1))
    save_as_before_torch_1_6({"model": state}, tmp_path / "old.pth")
    run_convert("from=lavis", "to=blip2train", f"source={tmp_path}/old.pth", f"target={tmp_path}/ours",
                *described(stage1, 1))  # fmt: skip
    run_convert("from=blip2train", "to=lavis", f"source={tmp_path}/ours", f"target={tmp_path}/back.pth")
    assert_same_file(tmp_path / "back.pth", state)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.qformer.hidden_size=32", r"model.qformer.hidden_size: the file has 64, the config 32"),
        ("model.qformer.num_queries=4", r"model.qformer.num_queries: the file has 8, the config 4"),
        ("model.qformer.num_layers=2", r"model.qformer.num_layers: the file has 4, the config 2"),
        ("model.qformer.vocab_size=30523", r"vocab_size .*: the file has 2001, the config 30523"),
        ("model.qformer.cross_attention_every=1", r"cross_attention_every: the file has 2, the config 1"),
        ("model.contrastive_dim=256", r"model.contrastive_dim: the file has 32, the config 256"),
        ("model.vision_encoder.image.size=80", r"17 tokens in the file, 26 in the config(.|\n)*image.size=64"),
        ("model.vision_encoder.layer=0", r"2 blocks in the file, 1 in the config(.|\n)*layer=1"),
        ("model.ln_vision=false", r"unexpected in the file: ln_vision"),
    ],
)
def test_another_model_is_named_by_the_setting_that_differs(
    stage1: LavisRun, tmp_path: Path, override: str, message: str
) -> None:
    torch.save({"model": state_of(stage1)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=message):
        run_convert("from=lavis", "to=blip2train", f"source={tmp_path}/file.pth", f"target={tmp_path}/ours",
                    *described(stage1, 1), override)  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.pth"]


def test_unknown_and_missing_tensors_leave_nothing_behind(stage1: LavisRun, tmp_path: Path) -> None:
    state = trained_only(state_of(stage1))
    arguments = ["from=lavis", "to=blip2train", f"target={tmp_path}/ours", *described(stage1, 1)]
    torch.save({"model": state | {"Qformer.bert.pooler.dense.weight": torch.ones(2)}}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match="Qformer.bert.pooler.dense.weight"):
        run_convert(*arguments, f"source={tmp_path}/more.pth")
    del state["Qformer.bert.encoder.layer.2.output_query.dense.weight"]
    torch.save({"model": state}, tmp_path / "less.pth")
    with pytest.raises(
        CheckpointError, match=r"missing from the file: qformer.blocks.2.query_ffn.contract.weight"
    ) as less:
        run_convert(*arguments, f"source={tmp_path}/less.pth")
    assert less.value.where == str(tmp_path / "less.pth"), "the user's file, not the one being written"
    (tmp_path / "cut.pth").write_bytes((tmp_path / "less.pth").read_bytes()[:5000])
    (tmp_path / "text.pth").write_text("garbage")
    for name in ("cut", "text"):
        with pytest.raises(CheckpointError, match="not a readable weights file"):
            run_convert(*arguments, f"source={tmp_path}/{name}.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.pth", "less.pth", "more.pth", "text.pth"]


def test_a_stage2_file_is_no_stage1_model(shared_data: Path, stage1: LavisRun, tmp_path: Path) -> None:
    torch.save({"model": trained_only(state_of(shared_run(shared_data, "stage2_opt")))}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="the file is of stage 2 with opt_proj, the config describes stage 1"):
        run_convert("from=lavis", "to=blip2train", f"source={tmp_path}/file.pth", f"target={tmp_path}/ours",
                    *described(stage1, 1))  # fmt: skip


def test_a_target_in_use_and_a_missing_description_are_refused(stage1: LavisRun, tmp_path: Path) -> None:
    torch.save({"model": trained_only(state_of(stage1))}, tmp_path / "file.pth")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    common = ["from=lavis", "to=blip2train", f"source={tmp_path}/file.pth"]
    with pytest.raises(ConfigError, match="the target is in use"):
        run_convert(*common, f"target={tmp_path}/full", *described(stage1, 1))
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    with pytest.raises(ConfigError, match="does not say which model"):
        run_convert(*common, f"target={tmp_path}/ours")
    with pytest.raises(ConfigError, match="known: blip2train, huggingface, lavis"):
        run_convert("from=lavis", "to=onnx", f"source={tmp_path}/file.pth", f"target={tmp_path}/ours")


def test_a_trained_run_becomes_a_lavis_file(stage1_run: RunDir, tmp_path: Path) -> None:
    run_convert("from=blip2train", "to=lavis", f"source={stage1_run.path}", f"target={tmp_path}/lavis")
    state = torch.load(tmp_path / "lavis" / "model.pth", weights_only=True)["model"]
    config = load_run_config(stage1_run)
    model: Any = load_model(config, stage1_run)
    assert torch.equal(state["temp"], model.temperature)
    assert torch.equal(state["Qformer.cls.predictions.decoder.weight"], model.qformer.text_embeddings.word.weight)
    assert torch.equal(
        state["Qformer.bert.embeddings.position_ids"], torch.arange(config.model.qformer.max_positions)[None]
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    twice = ("Qformer.bert.embeddings.position_ids", "Qformer.cls.predictions.decoder.weight",
             "Qformer.cls.predictions.decoder.bias")  # fmt: skip
    assert sum(tensor.numel() for name, tensor in state.items() if name not in twice) == trained
    notes = json.loads((tmp_path / "lavis" / "conversion.json").read_text())["notes"]
    assert any("bert-base-uncased" in note and "hidden_size 96 (LAVIS: 768)" in note for note in notes)
    assert "Limitations" in (tmp_path / "lavis" / "README.md").read_text()


def test_a_converted_stage1_starts_stage2(stage1: LavisRun, tmp_path: Path, laboratory: Any) -> None:
    torch.save({"model": state_of(stage1)}, tmp_path / "file.pth")
    run_convert("from=lavis", "to=blip2train", f"source={tmp_path}/file.pth", f"target={tmp_path}/ours",
                *described(stage1, 1))  # fmt: skip
    same = [item for item in described(stage1, 2) if not item.startswith("experiment=")]
    outcome = laboratory.train("microworld_stage2_opt", tmp_path / "stage2", f"init_from={tmp_path}/ours", *same)
    assert outcome.step == 4
    later = laboratory.train("microworld_stage2_opt", tmp_path / "more", f"init_from={outcome.run.path}", *same)
    model: Any = load_model(load_run_config(later.run), later.run)
    for name, tensor in model.vision_encoder.backbone.state_dict().items():  # LAVIS's encoder, not another one
        assert torch.equal(tensor, state_of(stage1)[f"visual_encoder.{name}"]), name


@pytest.mark.parametrize(("blocks", "in_checkpoint"), [("all", 2), ("1", 1)])
def test_a_trained_encoder_is_in_the_checkpoint_and_goes_back(
    stage1: LavisRun, tmp_path: Path, blocks: str, in_checkpoint: int
) -> None:
    state = state_of(stage1)
    torch.save({"model": state}, tmp_path / "file.pth")
    trained = f"model.vision_encoder.trainable_blocks={blocks}"
    run_convert("from=lavis", "to=blip2train", f"source={tmp_path}/file.pth", f"target={tmp_path}/ours",
                *described(stage1, 1), trained)  # fmt: skip
    weights = read_weights(find_checkpoint(RunDir(tmp_path / "ours")) / WEIGHTS)
    found = {name.split(".")[3] for name in weights if name.startswith("vision_encoder.backbone.blocks.")}
    assert len(found) == in_checkpoint
    run_convert("from=blip2train", "to=lavis", f"source={tmp_path}/ours", f"target={tmp_path}/back")
    assert_same_file(tmp_path / "back" / "model.pth", state)
    changed = "vision_encoder.backbone.blocks.1.attn.q_bias"
    checkpoint = find_checkpoint(RunDir(tmp_path / "ours"))
    save_weights(weights | {changed: weights[changed] + 1}, checkpoint, read_metadata(checkpoint))
    run_convert("from=blip2train", "to=lavis", f"source={tmp_path}/ours", f"target={tmp_path}/later")
    name = "visual_encoder.blocks.1.attn.q_bias"
    assert torch.equal(torch.load(tmp_path / "later" / "model.pth")["model"][name], state[name] + 1)


def test_what_lavis_cannot_hold_is_refused(stage1_run: RunDir, laboratory: Any, tmp_path: Path) -> None:
    tuned = laboratory.train("microworld_stage1", tmp_path / "tuned", "model.vision_encoder.trainable_blocks=1").run
    with pytest.raises(CheckpointError, match="a trained vit_tiny_patch16_224, which LAVIS does not have"):
        run_convert("from=blip2train", "to=lavis", f"source={tuned.path}", f"target={tmp_path}/lavis")
    plain = laboratory.train("microworld_stage1", tmp_path / "plain", "model.ln_vision=false").run
    with pytest.raises(CheckpointError, match="ln_vision is false"):
        run_convert("from=blip2train", "to=lavis", f"source={plain.path}", f"target={tmp_path}/lavis")
    copied = shutil.copytree(stage1_run.path, tmp_path / "adapter")
    checkpoint = find_checkpoint(RunDir(copied))
    adapter = {"language_model.model.layers.0.lora_A.weight": torch.ones(1)}
    save_weights(read_weights(checkpoint / WEIGHTS) | adapter, checkpoint, read_metadata(checkpoint))
    with pytest.raises(CheckpointError, match="1 trained tensors of the language model"):
        run_convert("from=blip2train", "to=lavis", f"source={copied}", f"target={tmp_path}/lavis")
    assert not list(tmp_path.glob("lavis*"))


@pytest.mark.parametrize("writer", ["blip2train.checkpoint.io.save_file", "blip2train.checkpoint.converted.save_file"])
def test_a_full_disk_leaves_nothing_behind(
    stage1: LavisRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    torch.save({"model": state_of(stage1)}, tmp_path / "file.pth")
    monkeypatch.setattr(writer, full)
    with pytest.raises(CheckpointError, match=r"the disk is full(.|\n)*another target="):
        run_convert("from=lavis", "to=blip2train", f"source={tmp_path}/file.pth", f"target={tmp_path}/ours",
                    *described(stage1, 1))  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.pth"]


def test_lavis_and_transformers_meet_in_our_form(stage1: LavisRun, tmp_path: Path) -> None:
    """What transformers cannot hold (temperature, [DEC] head) waits in its side file, so LAVIS gets all of it back."""
    state = state_of(stage1)
    torch.save({"model": state}, tmp_path / "file.pth")
    run_convert("from=lavis", "to=huggingface", f"source={tmp_path}/file.pth", f"target={tmp_path}/theirs",
                *described(stage1, 1))  # fmt: skip
    assert not list((tmp_path / "theirs").glob("between*"))
    run_convert("from=huggingface", "to=lavis", f"source={tmp_path}/theirs", f"target={tmp_path}/back")
    found = torch.load(tmp_path / "back" / "model.pth")["model"]
    assert set(found) == set(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert "file.pth" not in (tmp_path / "back" / "README.md").read_text()
    assert "theirs (huggingface)" in (tmp_path / "back" / "README.md").read_text()
