"""Checkpoints in shards of real trainings, put together by the convert command: the whole run's weights, bit for bit.

Each training writes, of the same step, plain Lightning's folder of shards and our whole checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from blip2train.checkpoint.find import find_checkpoint
from blip2train.checkpoint.io import WEIGHTS, read_metadata, read_weights
from blip2train.checkpoint.sharded import own_names
from blip2train.cli.config import build, compose
from blip2train.cli.convert import convert
from blip2train.cli.convert_sharded import read_sharded
from blip2train.cli.evaluate import load_model, load_run_config
from blip2train.cli.meta import without_weights
from blip2train.cli.resume import find_resume_point
from blip2train.errors import CheckpointError, ConfigError
from blip2train.model.freezing import trainable_state_dict
from blip2train.run_dir import RunDir
from tests.sharded_world import SHARDED, save_engine, train_sharded
from tests.two_ranks import on_two_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STEPS = 2
SMALL = [
    *("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", f"trainer.max_steps={STEPS}"),
    *("optim.warmup_steps=1", "data.batch_size=4", "data.num_workers=0", "num_threads=1", "log_every_steps=1"),
    "checkpoint.every_steps=0",
]
TRAININGS = {
    "zero2": ("microworld_stage1", "deepspeed_zero2"),
    "zero3": ("microworld_stage1", "deepspeed_zero3"),
    "fsdp2": ("microworld_stage1", "fsdp2"),
    "stage2": ("microworld_stage2_opt", "deepspeed_zero3"),
}


class Attack:
    """Leaves a folder behind if its pickle is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def run_convert(source: Path, target: Path, experiment: str = "microworld_stage1", *overrides: str) -> RunDir:
    given = ["from=sharded", "to=blip2train", f"source={source}", f"target={target}", f"experiment={experiment}"]
    convert(compose("convert", [*given, *overrides]))
    return RunDir.open(target)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


# --- one process: what the command makes of a folder's names and sizes


@pytest.fixture(scope="module")
def model(laboratory) -> Any:
    torch.manual_seed(0)
    return build(without_weights(laboratory.compose("microworld_stage1", Path("unused"))))


def save(folder: Path, state: dict[str, Tensor]) -> Path:
    dcp.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}, checkpoint_id=folder)
    torch.save({"global_step": 30}, folder / "meta.pt")
    return folder


def test_a_run_folder_of_trained_weights_and_the_frozen_encoder(model, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    state["temperature"] = state["temperature"].view(1)  # as sharding strategies need it
    run = run_convert(save(tmp_path / "shards", state), tmp_path / "ours")
    checkpoint = find_checkpoint(run)
    assert checkpoint.name == "step-0000030" and read_metadata(checkpoint)["step"] == 30
    assert same(read_weights(checkpoint / WEIGHTS), trainable_state_dict(model))
    (tmp_path / "ours").rename(tmp_path / "moved")  # a run folder may move
    moved = RunDir.open(tmp_path / "moved")
    loaded = load_model(load_run_config(moved), moved)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    with pytest.raises(ConfigError, match=r"no trainer state, so it cannot be continued(.|\n)*init_from="):
        find_resume_point(compose("train", ["experiment=microworld_stage1", f"resume={moved.path}"]),
                          RunDir(tmp_path / "next"))  # fmt: skip
    report = json.loads((moved.path / "conversion.json").read_text())
    assert any("train with init_from= this run; resume= needs" in item for item in report["not_held"])
    assert moved.read_manifest()["converted"] == {"from": "sharded", "file": "shards", "steps": 30}


def test_an_encoder_that_is_there_in_part_stays_with_the_weights(model, tmp_path: Path) -> None:
    """As in a checkpoint of a run whose encoder was trained in part: without it the encoder comes as configured."""
    name = next(name for name in model.state_dict() if name.startswith("vision_encoder.backbone."))
    extra = {name: model.state_dict()[name].bfloat16()}
    run = run_convert(save(tmp_path / "shards", trainable_state_dict(model) | extra), tmp_path / "ours")
    state = read_weights(find_checkpoint(run) / WEIGHTS)
    assert same(state, trainable_state_dict(model) | {name: extra[name].float()})
    assert not (run.path / "parts" / "vision_encoder.safetensors").exists()


def test_half_precision_becomes_float32_masters(model, tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in trainable_state_dict(model).items()}
    run = run_convert(save(tmp_path / "shards", half), tmp_path / "ours")
    assert same(read_weights(find_checkpoint(run) / WEIGHTS), {name: item.float() for name, item in half.items()})


def test_names_that_do_not_fit_are_listed_and_nothing_is_left(model, tmp_path: Path) -> None:
    state = trainable_state_dict(model)
    lost = next(name for name in state if name.startswith("qformer.blocks.0"))
    other = {name: tensor for name, tensor in state.items() if name != lost} | {"qformer.extra": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        run_convert(save(tmp_path / "shards", other), tmp_path / "ours")
    assert f"missing from the file: {lost}" in str(caught.value)
    assert "unexpected in the file: qformer.extra" in str(caught.value)
    assert "choose the experiment=" in str(caught.value) and str(tmp_path / "shards") in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


def test_shards_go_on_to_another_format_without_what_it_cannot_hold(model, tmp_path: Path) -> None:
    source = save(tmp_path / "shards", dict(model.state_dict()))
    given = ["from=sharded", "to=lavis", f"source={source}", f"target={tmp_path}/model.pth"]
    report = convert(compose("convert", [*given, "experiment=microworld_stage1"]))
    assert any(item.startswith("the vision encoder: LAVIS has no") for item in report.not_held)
    state = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert torch.equal(state["query_tokens"], model.qformer.query_tokens)
    assert not any(name.startswith("visual_encoder") for name in state)


def test_a_size_that_differs_is_named_with_its_setting(model, tmp_path: Path) -> None:
    source = save(tmp_path / "shards", trainable_state_dict(model))
    with pytest.raises(CheckpointError, match=r"model.qformer.num_queries: the file has \d+, the config 5"):
        run_convert(source, tmp_path / "ours", "microworld_stage1", "model.qformer.num_queries=5")


# --- two ranks


@pytest.fixture(scope="module")
def trained(laboratory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    folder = tmp_path_factory.mktemp("trained")
    jobs = [
        [f"experiment={experiment}", f"paths.data={laboratory.data}", *SMALL, f"trainer={trainer}",
         f"run_dir={folder / name}", *(["init_from=scratch"] if name == "stage2" else [])]
        for name, (experiment, trainer) in TRAININGS.items()
    ]  # fmt: skip
    return dict(zip(TRAININGS, train_sharded(folder / "processes", jobs), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_shards_of_two_ranks_become_the_whole_weights_bit_for_bit(
    name: str, trained: dict[str, RunDir], laboratory, tmp_path: Path
) -> None:
    whole = trained[name]
    run = run_convert(whole.path / SHARDED, tmp_path / "ours", TRAININGS[name][0], f"paths.data={laboratory.data}")
    expected = read_weights(find_checkpoint(whole) / WEIGHTS)
    assert same(read_weights(find_checkpoint(run) / WEIGHTS), expected)
    assert find_checkpoint(run).name == find_checkpoint(whole).name == f"step-{STEPS:07d}"
    ours = dict(load_model(load_run_config(run), run).state_dict())
    theirs = dict(load_model(load_run_config(whole), whole).state_dict())
    assert same(ours, theirs)  # backbones too, which ours has in parts/
    assert (run.path / "parts" / "language_model" / "model.safetensors").is_file() == (name == "stage2")


@pytest.mark.slow
def test_a_converted_run_starts_another(trained: dict[str, RunDir], laboratory, tmp_path: Path) -> None:
    run = run_convert(trained["zero2"].path / SHARDED, tmp_path / "ours", "microworld_stage1",
                      f"paths.data={laboratory.data}")  # fmt: skip
    started = laboratory.train("microworld_stage1", tmp_path / "next", f"init_from={run.path}", "trainer.max_steps=2")
    origins = json.loads(started.run.init_path.read_text())
    assert str(run.path) in json.dumps(origins)


@pytest.mark.slow
def test_real_deepspeed_files_are_guarded(trained: dict[str, RunDir], tmp_path: Path) -> None:
    """A rank's file that is missing, of another step's save, or with code in it; the tool itself reads in safety."""
    shards = shutil.copytree(trained["zero3"].path / SHARDED, tmp_path / "shards")
    first, second = sorted((shards / "checkpoint").glob("*_optim_states.pt"))
    content = torch.load(second, weights_only=False)
    second.rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match="written by 2 ranks; no file of rank 1"):
        run_convert(shards, tmp_path / "ours")
    for entries in content["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
        entries["step"] = torch.tensor(1.0)
    torch.save(content, second)
    with pytest.raises(CheckpointError, match=r"different optimizer steps: .*rank_0.*: 2.0, .*rank_1.*: 1.0"):
        run_convert(shards, tmp_path / "ours")
    torch.save(content | {"x": Attack(tmp_path / "mark")}, second)
    with pytest.raises(CheckpointError, match="mkdir; no code of it was run"):
        run_convert(shards, tmp_path / "ours")
    shutil.copy(tmp_path / "aside", second)
    other = torch.load(first, weights_only=False)
    flat = other["optimizer_state_dict"]["fp32_flat_groups"]
    other["optimizer_state_dict"]["fp32_flat_groups"] = [flat[0][:-1], *flat[1:]]
    torch.save(other, first)
    with pytest.raises(CheckpointError, match="DeepSpeed cannot put it together"):
        run_convert(shards, tmp_path / "ours")
    assert not (tmp_path / "mark").exists() and not (tmp_path / "ours").exists()


ENGINES = {
    "zero1": ({"zero_optimization": {"stage": 1}}, False),
    "zero2_bf16": ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, True),
    "zero3_bf16": ({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_float32_masters_come_out_of_deepspeeds_own_engine(name: str, tmp_path: Path) -> None:
    """Half-precision weights in the folder are not what is read; frozen ones are there where they were not left out."""
    settings, exclude_frozen = ENGINES[name]
    masters, again = on_two_ranks(save_engine, tmp_path, str(tmp_path / "shards"), settings, exclude_frozen)
    found = read_sharded(tmp_path / "shards")
    assert found.kind == f"DeepSpeed ZeRO-{name[4]}" and found.ranks == 2 and found.step == 1
    state = own_names(found.state, where="w")
    assert masters.keys() == {"1.weight", "1.bias"} and same(masters, again)
    assert same({name: state[name] for name in masters}, masters)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters.values())
    assert ("0.weight" in state) != exclude_frozen
    assert exclude_frozen or state["0.weight"].shape == (7, 5)
