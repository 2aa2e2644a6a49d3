"""Folders of shards before they are put together: which kind, whole or not, and nothing pickled that runs."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from blip2train.checkpoint import sharded_dcp
from blip2train.checkpoint.sharded import Inert, own_name, own_names, read_inert
from blip2train.checkpoint.sharded_dcp import find_dcp, read_dcp
from blip2train.checkpoint.sharded_deepspeed import find_deepspeed, read_deepspeed
from blip2train.cli.convert_sharded import read_sharded
from blip2train.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Attack:
    """Leaves a folder behind if its pickle is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


class LossScaler:
    """Stands for an object of DeepSpeed's in a file that this process writes."""

    def __init__(self) -> None:
        self.cur_scale = 1.0


LossScaler.__module__ = "deepspeed.a_module_of_another_version"


def test_every_wrappers_part_of_a_name_goes() -> None:
    names = {
        "_forward_module.module.model.qformer.query_tokens": "qformer.query_tokens",
        "model._orig_mod.qformer.blocks.0._checkpoint_wrapped_module.key.weight": "qformer.blocks.0.key.weight",
        "module.model.language_model.model.layers.0._fsdp_wrapped_module.a": "language_model.model.layers.0.a",
        "temperature": "temperature",
    }
    assert {own_name(name) for name in names} == set(names.values())
    assert all(own_name(name) == own for name, own in names.items())
    with pytest.raises(CheckpointError, match="qformer.a is in it twice, the second time as model.qformer.a"):
        own_names({"qformer.a": torch.zeros(1), "model.qformer.a": torch.zeros(1)}, where="w")


# --- torch.distributed.checkpoint


def save_dcp(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"qformer.a": torch.randn(5, 3), "temperature": torch.tensor(0.07), "vision.b": torch.randn(4).bfloat16()}


@pytest.mark.parametrize(
    "save",
    [
        lambda state: {"state_dict": {f"model.{name}": item for name, item in state.items()}, "optimizer_0": {"x": 1}},
        lambda state: {"model": state, "optim": {"state": {"model.qformer.a": {"exp_avg": torch.zeros(2)}}}},
        lambda state: {"app": {"model": state, "optim": {"step": 3}}},
        lambda state: state | {"optimizer": {"state": {"step": torch.tensor(3.0)}}},
        lambda state: state,
    ],
    ids=["lightning", "fabric", "tutorial", "bare", "alone"],
)
def test_weights_are_found_wherever_a_trainer_has_put_them(save: Callable[[Any], Any], tmp_path: Path) -> None:
    found = read_sharded(save_dcp(tmp_path / "dcp", save(weights())))
    assert found.ranks == 1 and found.step == 0
    state = own_names(found.state, where="w")
    assert state.keys() == weights().keys()
    assert all(torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype
               for name, tensor in weights().items())  # fmt: skip
    assert all(name.startswith(("optim", "app")) for name in found.left_behind)


def test_the_step_comes_from_lightnings_facts_and_their_objects_are_not_built(tmp_path: Path) -> None:
    folder = save_dcp(tmp_path / "dcp", weights())
    torch.save({"global_step": 70, "hyper_parameters": {"folder": Path("a")}}, folder / "meta.pt")
    assert read_dcp(folder).step == 70
    torch.save({"global_step": 70, "x": Attack(tmp_path / "mark")}, folder / "meta.pt")
    with pytest.raises(CheckpointError, match=r"mkdir; no code of it was run(.|\n)*delete meta.pt"):
        read_dcp(folder)
    assert not (tmp_path / "mark").exists()


def test_a_table_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = save_dcp(tmp_path / "dcp", weights())
    (folder / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "mark")))
    with pytest.raises(CheckpointError, match=r"calls (posix|nt)\.mkdir\); no code of it was run"):
        read_dcp(folder)
    (folder / ".metadata").write_bytes(pickle.dumps([1]))
    with pytest.raises(CheckpointError, match="not a table"):
        read_dcp(folder)
    (folder / ".metadata").write_bytes(b"\x80\x04\x95garbage")
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_dcp(folder)
    assert not (tmp_path / "mark").exists()


def test_a_ranks_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = save_dcp(tmp_path / "dcp", {"a": torch.zeros(200, 200)})
    (folder / "__0_0.distcp").unlink()
    torch.save({"x": Attack(tmp_path / "mark"), "fill": torch.zeros(200, 200)}, folder / "__0_0.distcp")
    table = sharded_dcp._read_table(folder / ".metadata")
    for place in table.storage_data.values():
        place.offset, place.length = 0, (folder / "__0_0.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(CheckpointError, match=r"cannot be read \(more than tensors(.|\n)*no code of them was run"):
        read_dcp(folder)
    assert not (tmp_path / "mark").exists()


def test_a_pickled_object_beside_the_weights_is_never_loaded(tmp_path: Path) -> None:
    """DCP's own loader would unpickle it with everything it calls."""
    folder = save_dcp(tmp_path / "dcp", {"state_dict": weights(), "hook": Attack(tmp_path / "mark")})
    assert read_dcp(folder).left_behind == ["hook"]
    assert not (tmp_path / "mark").exists()


def test_missing_short_and_foreign_files_are_named(tmp_path: Path) -> None:
    folder = save_dcp(tmp_path / "dcp", weights())
    table, data = folder / ".metadata", folder / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=rf"__0_0.distcp has {len(whole) - 100} bytes, .metadata needs"):
        read_dcp(folder)
    data.write_bytes(bytes(len(whole)))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_dcp(folder)
    data.unlink()
    with pytest.raises(CheckpointError, match=r"1 of 1 files are missing: __0_0.distcp"):
        read_dcp(folder)
    data.write_bytes(whole)
    text = table.read_bytes()
    assert text.count(b"__0_0.distcp") >= 1
    table.write_bytes(text.replace(b"__0_0.distcp", b"../_0.distcp"))
    with pytest.raises(CheckpointError, match=r"names '../_0.distcp', not a rank's file beside it"):
        read_dcp(folder)
    table.unlink()
    with pytest.raises(CheckpointError, match=r"without .metadata(.|\n)*did not finish"):
        find_dcp(folder)


def test_a_tensor_that_no_rank_has_written_whole_is_named(tmp_path: Path) -> None:
    folder = save_dcp(tmp_path / "dcp", weights())
    table = sharded_dcp._read_table(folder / ".metadata")
    table.state_dict_metadata["qformer.a"].chunks[0].sizes = torch.Size([4, 3])
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(CheckpointError, match="1 tensors are in it in part only: qformer.a"):
        read_dcp(folder)


def test_a_folder_with_no_weights_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights in it, only optimizer"):
        read_dcp(save_dcp(tmp_path / "dcp", {"optimizer": {"step": torch.tensor(1.0)}}))


# --- DeepSpeed: what is said before its tool is asked


def save_zero(folder: Path, *, world: int = 2, stage: int = 2, ranks: tuple[int, ...] = (0, 1), step: int = 7) -> Path:
    """Files as DeepSpeed names and fills them, with what is looked at before its tool is."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in ranks:
        state = {
            "zero_stage": stage,
            "partition_count": [world],
            "base_optimizer_state": {"state": {0: {"step": step}}},
        }
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
        torch.save({"module": {}, "global_steps": step}, folder / f"{name}_model_states.pt")
    return folder


def optim_file(folder: Path, rank: int) -> Path:
    return folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def lose_optimizer(folder: Path) -> None:
    for rank in (0, 1):
        optim_file(folder, rank).unlink()


def cut(folder: Path) -> None:
    path = optim_file(folder, 1)
    path.write_bytes(path.read_bytes()[:300])


PROBLEMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: optim_file(f, 1).unlink(), "written by 2 ranks; no file of rank 1"),
    "surplus": (lambda f: save_zero(f, ranks=(2,)), "written by 2 ranks; a file too many of rank 2"),
    "mixed worlds": (lambda f: save_zero(f, world=3, ranks=(2,)), "different numbers of ranks: .*rank_2.*: 3"),
    "mixed steps": (lambda f: save_zero(f, ranks=(1,), step=8), r"different optimizer steps: .*7.0, .*8.0"),
    "mixed stages": (lambda f: save_zero(f, ranks=(1,), stage=3), "different ZeRO stages: .*2, .*3"),
    "no optimizer": (lose_optimizer, "no file of optimizer states"),
    "no model": (lambda f: (f / "mp_rank_00_model_states.pt").unlink(), "no file of model states"),
    "cut": (cut, "not a readable weights file, or not all of it"),
    "no ZeRO": (lambda f: torch.save({"a": 1}, optim_file(f, 0)), "holds no optimizer state of ZeRO"),
    "two of a rank": (lambda f: (f / f"bf16_{optim_file(f, 0).name}").touch(), "two files of rank 0: bf16_zero"),
    "tensor parallel": (lambda f: (f / "mp_rank_01_model_states.pt").touch(), "mp_rank_01.*tensor parallel"),
    "stage": (lambda f: save_zero(f, stage=0), "of ZeRO stage 0 and 2 ranks"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_deepspeed_files_that_do_not_make_one_checkpoint_are_named(problem: str, tmp_path: Path) -> None:
    harm, message = PROBLEMS[problem]
    folder = save_zero(tmp_path / "checkpoint")
    harm(folder)
    with pytest.raises(CheckpointError, match=message):
        read_deepspeed(folder)


def test_under_zero3_every_rank_has_a_part_of_the_model(tmp_path: Path) -> None:
    folder = save_zero(tmp_path / "checkpoint", stage=3)
    (folder / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="1 files of model states, 2 belong(.|\n)*missing of ranks 1"):
        read_deepspeed(folder)


@pytest.mark.parametrize("file", ["zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
def test_a_deepspeed_file_with_code_in_it_is_refused_and_not_run(file: str, tmp_path: Path) -> None:
    folder = save_zero(tmp_path / "checkpoint")
    torch.save(torch.load(folder / file) | {"x": Attack(tmp_path / "mark")}, folder / file)
    with pytest.raises(CheckpointError, match=r"mkdir; no code of it was run"):
        read_deepspeed(folder)
    assert not (tmp_path / "mark").exists()


def test_objects_of_a_training_library_are_read_as_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even of a module that this machine does not have: it is not imported."""
    fake = type(os)("deepspeed.a_module_of_another_version")
    monkeypatch.setattr(fake, "LossScaler", LossScaler, raising=False)
    with monkeypatch.context() as writing:
        writing.setitem(__import__("sys").modules, "deepspeed", type(os)("deepspeed"))
        writing.setitem(__import__("sys").modules, fake.__name__, fake)
        torch.save({"scaler": LossScaler(), "kept": torch.ones(2)}, tmp_path / "a.pt")
    found = read_inert(tmp_path / "a.pt", fix="none")
    assert type(found["scaler"]) is Inert and vars(found["scaler"]) == {} and found["kept"].sum() == 2


def test_the_checkpoint_of_a_folder_is_found(tmp_path: Path) -> None:
    one = save_zero(tmp_path / "global_step10")
    assert find_deepspeed(one) == one and find_deepspeed(tmp_path) == one
    two = save_zero(tmp_path / "global_step20")
    with pytest.raises(CheckpointError, match=r"2 checkpoints, and no file 'latest'(.|\n)*global_step20"):
        find_deepspeed(tmp_path)
    (tmp_path / "latest").write_text("global_step20\n")
    assert find_deepspeed(tmp_path) == two
    for wrong in ("global_step30", "../elsewhere", ""):
        (tmp_path / "latest").write_text(wrong)
        with pytest.raises(
            CheckpointError, match=r"latest names '.*', which is no folder(.|\n)*there are: global_step10"
        ):
            find_deepspeed(tmp_path)


def test_what_is_no_such_folder_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in shards: neither .metadata"):
        read_sharded(tmp_path)
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"a file, not a folder: it is whole already"):
        read_sharded(tmp_path / "a.ckpt")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").touch()
    with pytest.raises(CheckpointError, match="a run folder of ours"):
        read_sharded(tmp_path)
