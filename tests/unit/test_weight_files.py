"""One reader for every weights file that a user hands in: whole ones are read, damaged and unsafe ones refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from blip2train.errors import CheckpointError
from blip2train.weight_files import find_weights, in_folder, read_tensors, read_weights

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16), "c": torch.zeros(1)}


class Harm:
    """Makes a folder when it is unpickled by an unsafe reader."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.sentinel),))


def save_shards(folder: Path, suffix: str) -> Path:
    """Two shards and their index, as transformers names them."""
    names = {part: f"model-0000{number}-of-00002{suffix}" for number, part in enumerate(("first", "second"), start=1)}
    parts = {names["first"]: {"a": STATE["a"]}, names["second"]: {"b": STATE["b"], "c": STATE["c"]}}
    for name, state in parts.items():
        save_file(state, folder / name) if suffix == ".safetensors" else torch.save(state, folder / name)
    index = folder / ("model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"weight_map": {key: name for name, state in parts.items() for key in state}}))
    return index


def assert_is_state(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) and found[name].dtype == STATE[name].dtype for name in STATE)


@pytest.mark.parametrize("under", [None, "model", "state_dict"])
@pytest.mark.parametrize("archive", [True, False])
def test_a_pickled_state_dict_is_read_bare_or_under_a_key(tmp_path: Path, under: str | None, archive: bool) -> None:
    path = tmp_path / "weights.pth"
    content = STATE if under is None else {under: STATE, "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    assert_is_state(read_tensors(path))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_read_as_one(tmp_path: Path, suffix: str) -> None:
    save_shards(tmp_path, suffix)
    assert_is_state(read_weights(in_folder(tmp_path), where="x"))
    assert len(find_weights(in_folder(tmp_path), where="x")) == 2


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_missing_shard_is_named_before_anything_is_read(tmp_path: Path, suffix: str) -> None:
    save_shards(tmp_path, suffix)
    (tmp_path / f"model-00002-of-00002{suffix}").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards are missing: model-00002"):
        find_weights(in_folder(tmp_path), where="x")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path, suffix: str) -> None:
    index = save_shards(tmp_path, suffix)
    places = json.loads(index.read_text())["weight_map"] | {"d": f"model-00001-of-00002{suffix}"}
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"model-00001\S+ lacks 1 tensors .*: d"):
        read_weights(in_folder(tmp_path), where="x")


def test_an_index_may_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"a shard outside its folder: \.\./other"):
        find_weights(in_folder(tmp_path), where="x")


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, archive: bool) -> None:
    path = tmp_path / "weights.bin"
    torch.save(STATE | {"d": Harm(tmp_path / "ran")}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=r"a pickle that calls \w+\.mkdir; no code of it was run"):
        read_tensors(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").is_dir()  # the file is live: an unsafe reader runs it


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_file_that_is_cut_short_or_garbage_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_file(STATE, path) if name.endswith("safetensors") else torch.save(STATE, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"garbage", b""):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"not a readable weights file(.|\n)*{name}"):
            read_tensors(path)
        with pytest.raises(CheckpointError) as caught:
            read_tensors(path)
        assert "weights_only" not in str(caught.value), "torch's advice to read unsafely"


def test_what_is_not_tensors_by_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    for content in ([torch.ones(1)], {"a": torch.ones(1), "epoch": 3}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="more than tensors by name"):
            read_tensors(path)
