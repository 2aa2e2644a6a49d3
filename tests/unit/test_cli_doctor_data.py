"""What the doctor says of shards and weights: present, damaged, missing, to be fetched; nothing is downloaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from flaky_server import FlakyServer, serve
from safetensors.torch import save_file
from shard_factory import write_shards

from blip2train.cli.config import compose
from blip2train.cli.doctor import hub, shards, weights
from blip2train.cli.doctor.context import Context
from blip2train.cli.doctor.launch import Launch
from blip2train.cli.doctor.row import Row
from blip2train.cli.doctor.shards import check_shards, choose_shards
from blip2train.cli.doctor.weights import check_weights
from blip2train.errors import CheckpointError, ConfigError


def context(tmp_path: Path, *overrides: str, experiment: str = "microworld_stage1") -> Context:
    composed = compose("doctor", [f"experiment={experiment}", f"run_dir={tmp_path / 'run'}", *overrides])
    return Context(composed, Launch(), shards=4)


def look(tmp_path: Path, folder: Path | str, *overrides: str, reads: bool = False) -> list[Row]:
    """Rows of the datasets alone, without the loader's speed, which is measured for seconds."""
    given = context(tmp_path, f"data.datasets.microworld.urls={folder}", *overrides)
    with pytest.MonkeyPatch.context() as patch:
        if not reads:
            patch.setattr(shards, "read_rate", lambda config: 100.0)
        else:
            patch.setattr(shards, "SECONDS_OF_READING", 0.2)
        return list(check_shards(given))


def test_shards_that_are_in_order_are_read_as_training_reads_them(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", [20, 20, 20])
    dataset, speed = look(tmp_path, tmp_path / "data", reads=True)
    assert dataset.status == "ok" and dataset.measured.startswith("microworld: 3 shards, 48 records of 3 looked at")
    assert speed.status == "ok" and "samples/s" in speed.measured


def test_a_sample_is_the_same_at_every_call_and_has_both_ends() -> None:
    urls = [str(number) for number in range(100)]
    chosen = choose_shards(urls, 6)
    assert chosen == choose_shards(urls, 6) and len({*chosen}) == 6
    assert chosen[0] == "0" and chosen[-1] == "99" and chosen == sorted(chosen, key=int)
    assert choose_shards(urls[:3], 6) == urls[:3] and choose_shards(urls, 1) == ["0"]


def test_shards_that_do_not_exist_fail(tmp_path: Path) -> None:
    (row,) = look(tmp_path, tmp_path / "nowhere")
    assert row.status == "fail" and "do not exist" in row.measured and "data pack" in row.advice


def test_shards_without_an_index_are_a_warning(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", [5], index=False)
    row, _ = look(tmp_path, tmp_path / "data")
    assert row.status == "warn" and "data index" in row.advice


def test_a_shard_of_the_index_that_is_gone_fails(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", [5, 5, 5])[1].unlink()
    (row,) = look(tmp_path, tmp_path / "data")
    assert row.status == "fail" and "missing_shard" in row.measured and "s-001.tar" in row.measured


def test_a_copy_that_broke_off_is_found_by_its_size_wherever_it_lies(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "data", [3] * 30)
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    for row, path in zip(index["shards"], paths, strict=True):
        row["num_bytes"] = path.stat().st_size
    (tmp_path / "data" / "index.json").write_text(json.dumps(index))
    not_opened = next(path for path in paths if str(path) not in choose_shards([*map(str, paths)], 4))
    not_opened.write_bytes(not_opened.read_bytes()[:-1000])
    (found,) = look(tmp_path, tmp_path / "data")
    assert found.status == "fail" and not_opened.name in found.measured


def test_a_tar_that_ends_early_fails_even_behind_the_records_looked_at(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path / "data", [40], index=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    (row,) = look(tmp_path, tmp_path / "data")
    assert row.status == "fail" and "truncated_shard" in row.measured


def test_damaged_records_are_a_warning_up_to_the_share_that_training_bears(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", [20], broken={3: b"no image"})
    row, _ = look(tmp_path, tmp_path / "data")
    assert row.status == "warn" and "corrupt_image" in row.measured and "data check" in row.advice
    (row,) = look(tmp_path, tmp_path / "data", "data.max_dropped_share=0.01")
    assert row.status == "fail"


def test_an_empty_shard_fails(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", [0])
    (row,) = look(tmp_path, tmp_path / "data")
    assert row.status == "fail" and "no record" in row.measured


def test_remote_shards_are_fetched_in_small_number_and_named_when_out_of_reach(tmp_path: Path) -> None:
    paths = [*write_shards(tmp_path / "data", [4, 4, 4]), tmp_path / "data" / "index.json"]
    cache = f"data.cache.folder={tmp_path / 'copies'}"
    with serve(FlakyServer({f"/{path.name}": path.read_bytes() for path in paths})) as server:
        (row,) = look(tmp_path, f"'{server.url}/s-{{000..002}}.tar'", cache)
        assert row.status == "ok" and "records of 2 looked at" in row.measured
        assert "/s-001.tar" not in [path for path, _ in server.requests]
        del server.files["/s-002.tar"]
        shutil.rmtree(tmp_path / "copies")
        (row,) = look(tmp_path, f"'{server.url}/s-{{000..002}}.tar'", cache)
    assert row.status == "fail" and "unreachable_shard" in row.measured and "s-002.tar" in row.measured


def test_a_config_without_a_dataset_fails(tmp_path: Path) -> None:
    (row,) = check_shards(context(tmp_path, "~data/dataset@data.datasets.microworld"))
    assert row.status == "fail" and "no dataset" in row.measured


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which may not be asked."""
    state = hub.HubState(offline=True, cache=tmp_path / "hub")
    monkeypatch.setattr(weights, "hub_state", lambda: state)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(state.cache))
    return state.cache


def put(cache: Path, repository: str, name: str, content: bytes = b"{}") -> Path:
    """Lay a file into the cache as the hub's client does."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True, exist_ok=True)
    (folder / "snapshots" / "abc" / name).write_bytes(content)
    return folder / "snapshots" / "abc" / name


def tensors(path: Path, *names: str) -> Path:
    save_file({name: torch.zeros(3) for name in names or ("a",)}, path)
    return path


def test_the_shipped_weights_are_there(tmp_path: Path) -> None:
    rows = list(check_weights(context(tmp_path)))
    assert [row.status for row in rows] == ["ok", "ok"]
    assert "vision encoder" in rows[0].measured and "tokenizer" in rows[1].measured
    rows = list(check_weights(context(tmp_path, "init_from=scratch", experiment="microworld_stage2_opt")))
    assert [row.status for row in rows] == ["ok"] * 3 and "language model" in rows[2].measured


def test_each_missing_source_is_a_row_with_what_to_fetch(tmp_path: Path, cache: Path) -> None:
    rows = list(check_weights(context(tmp_path, "trainer.devices=1", experiment="paper/stage1_vitg")))
    assert [row.status for row in rows] == ["fail"] * 3
    assert "model.safetensors or pytorch_model.bin of timm/eva_giant_patch14_clip_224.laion400m" in rows[0].measured
    assert all("HF_HUB_OFFLINE" in row.measured and "hf download" in row.advice for row in rows)
    assert "init_qformer=FOLDER" in rows[1].advice and not cache.exists()


def test_weights_in_the_cache_are_found(tmp_path: Path, cache: Path) -> None:
    encoder = "timm/eva_giant_patch14_clip_224.laion400m"
    put(cache, encoder, "pytorch_model.bin")
    tensors(put(cache, "google-bert/bert-base-uncased", "model.safetensors"))
    put(cache, "google-bert/bert-base-uncased", "config.json")
    put(cache, "bert-base-uncased", "vocab.txt")
    rows = list(check_weights(context(tmp_path, "trainer.devices=1", experiment="paper/stage1_vitg")))
    assert [row.status for row in rows] == ["ok"] * 3, rows


def test_a_shard_that_the_cache_lacks_is_named(cache: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    put(cache, "x/y", "model.safetensors.index.json", json.dumps(index).encode())
    tensors(put(cache, "x/y", "model-1.safetensors"), "a")
    put(cache, "x/y", "config.json")
    row = weights.look_at_model("language model", "x/y", "llm.path")
    assert row.status == "fail" and "model-2.safetensors" in row.measured and "model-1" not in row.measured
    tensors(put(cache, "x/y", "model-2.safetensors"), "b")
    assert weights.look_at_model("language model", "x/y", "llm.path").status == "ok"


@pytest.mark.parametrize(("size", "status"), [(2 * 10**9, "warn"), (None, "fail")])
def test_what_the_hub_has_is_a_warning_and_what_it_does_not_answer_for_fails(
    cache: Path, monkeypatch: pytest.MonkeyPatch, size: int | None, status: str
) -> None:
    monkeypatch.setattr(weights, "hub_state", lambda: hub.HubState(offline=False, cache=cache))
    monkeypatch.setattr(weights, "remote_bytes", lambda repository, names: size)
    row = weights.look_at_model("language model", "x/y", "llm.path")
    assert row.status == status and (size is None or "4.00 GB" in row.measured)


def test_the_hub_out_of_reach_has_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)
    assert hub.remote_bytes("x/y", ["a", "b"]) is None


def test_files_and_folders_of_weights(tmp_path: Path) -> None:
    assert weights.look_at_path("vision encoder", tensors(tmp_path / "own.safetensors")).status == "ok"
    torch.save({"a": torch.zeros(2)}, tmp_path / "own.pth")
    assert weights.look_at_path("vision encoder", tmp_path / "own.pth").status == "ok"
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "own.safetensors").read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        weights.look_at_path("vision encoder", tmp_path / "torn.safetensors")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ConfigError, match="is empty"):
        weights.look_at_path("vision encoder", tmp_path / "empty.pth")
    with pytest.raises(ConfigError, match="no file"):
        weights.look_at_path("vision encoder", tmp_path / "none.pth")
    with pytest.raises(ConfigError, match="no tokenizer"):
        weights.look_at_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="no config.json"):
        weights.look_at_model("language model", str(tmp_path), "llm.path")


def test_a_file_that_is_gone_is_a_row_among_the_others(tmp_path: Path) -> None:
    rows = list(check_weights(context(tmp_path, f"model.vision_encoder.weights={tmp_path / 'none.safetensors'}")))
    assert [row.status for row in rows] == ["fail", "ok"] and "none.safetensors" in rows[0].measured


def test_an_encoder_that_timm_has_no_weights_for_fails(tmp_path: Path) -> None:
    named = context(
        tmp_path,
        *("model.vision_encoder.weights=null", "model.vision_encoder.pretrained=true"),
        "model.vision_encoder.name=vit_small_patch8_224",
    )
    row = next(check_weights(named))
    assert row.status == "fail" and "weights" in row.advice
