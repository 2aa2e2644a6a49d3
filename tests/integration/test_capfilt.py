"""`blip2train capfilt` from shards to training: models of transformers, runs of our own, several processes, kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from capfilt_world import save_blip, save_clip
from omegaconf import DictConfig

from blip2train.cli.capfilt import capfilt
from blip2train.cli.config import compose
from blip2train.cli.processes import count_children
from blip2train.data.shards import read_shard
from blip2train.distributed import launched_as
from blip2train.errors import ConfigError, DataError
from blip2train.run_dir import RunDir, read_json

FEW = ("captioner.settings.num_captions=3", "captioner.settings.max_tokens=8", "batch_size=8", "device=cpu")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    save_blip(folder / "blip")
    save_clip(folder / "clip")
    return f"captioner.model={folder / 'blip'}", f"ranker.model={folder / 'clip'}"


def settings(urls: Path, out: Path, *overrides: str) -> list[str]:
    return [f"urls=[{urls}/*.tar]", f"out={out}", *FEW, *overrides]


def config(urls: Path, out: Path, *overrides: str) -> DictConfig:
    return compose("capfilt", settings(urls, out, *overrides))


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {record["__key__"]: record for path in sorted(folder.glob("*.tar")) for record in read_shard(str(path))}


def captions(folder: Path) -> dict[str, list[str]]:
    return {key: json.loads(record["json"])["captions"] for key, record in records(folder).items()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def shards(laboratory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the training shards of the little world."""
    folder = tmp_path_factory.mktemp("shards")
    for path in (laboratory.data / "microworld").rglob("*train*.tar"):
        shutil.copy(path, folder / path.name)
    assert list(folder.glob("*.tar"))
    return folder


def test_a_run_of_stage_1_or_2_captions_as_well_as_a_model_of_transformers(
    shards: Path, models: tuple[str, str], stage1_run: RunDir, stage2_run: RunDir, tmp_path: Path
) -> None:
    for name, captioner in (
        ("one", f"captioner.model={stage1_run.path}"),
        ("two", f"captioner.model={stage2_run.path}"),
    ):
        manifest = capfilt(config(shards, tmp_path / name, models[1], captioner))
        assert manifest is not None
        assert manifest["num_records"] == len(records(shards))
        assert manifest["counts"]["synthetic_candidates"] > 0
        assert manifest["settings"]["captioner"]["checkpoint"] == "step-0000004"
        assert (tmp_path / name / "report.html").is_file()
    assert captions(tmp_path / "one") != captions(tmp_path / "two")


def test_another_batch_size_gives_the_same_captions(shards: Path, models: tuple[str, str], tmp_path: Path) -> None:
    for size in (5, 64):
        capfilt(config(shards, tmp_path / str(size), *models, f"batch_size={size}"))
    assert captions(tmp_path / "5") == captions(tmp_path / "64")


def test_a_finished_folder_is_not_done_again_and_loads_no_model(
    shards: Path, models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = capfilt(config(shards, tmp_path / "out", *models))
    before = content(tmp_path / "out")
    monkeypatch.setattr("blip2train.cli.capfilt.load_captioner", None)
    assert capfilt(config(shards, tmp_path / "out", *models)) == first
    assert content(tmp_path / "out") == before


def test_other_settings_or_weights_are_refused_in_the_same_folder(
    shards: Path, models: tuple[str, str], tmp_path: Path
) -> None:
    clip = tmp_path / "clip"
    shutil.copytree(models[1].removeprefix("ranker.model="), clip)
    capfilt(config(shards, tmp_path / "out", models[0], f"ranker.model={clip}"))
    with pytest.raises(DataError, match=r"captioner\.seed: 0 there, 1 now"):
        capfilt(config(shards, tmp_path / "out", models[0], f"ranker.model={clip}", "captioner.settings.seed=1"))
    save_clip(clip, seed=9)
    with pytest.raises(DataError, match=r"ranker\.weights"):
        capfilt(config(shards, tmp_path / "out", models[0], f"ranker.model={clip}"))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("captioner.model=/no/such/model", "cannot be loaded as a captioner"),
        ("ranker.model=/no/such/model", "cannot be loaded as a ranker"),
        ("captioner.dtype=float8", "precision 'float8'"),
        ("num_processes=0", "num_processes=0"),
        ("batch_size=0", "batch_size=0"),
    ],
)
def test_what_cannot_be_used_is_said_before_any_work(
    shards: Path, models: tuple[str, str], tmp_path: Path, override: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        capfilt(config(shards, tmp_path / "out", *models, override))
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_refused_call_is_repeated_in_the_same_folder_with_what_was_wrong_corrected(
    shards: Path, models: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded as a ranker"):
        capfilt(config(shards, tmp_path / "out", *models, "ranker.model=/no/such/model"))
    one = f"urls=[{min(shards.glob('*.tar'))}]"
    manifest = capfilt(compose("capfilt", [*settings(shards, tmp_path / "out", *models), one]))
    assert manifest is not None and len(manifest["shards"]) == 1


def test_a_process_knows_its_place_from_torchrun_and_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert launched_as() == (0, 1, 0)
    for name, value in {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert launched_as() == (3, 4, 0)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launched_as() == (5, 8, 1)


def test_a_launcher_and_num_processes_must_agree() -> None:
    assert [count_children("auto", 8, "auto"), count_children(8, 8, "auto"), count_children(3, 1, "cpu")] == [0, 0, 2]
    with pytest.raises(ConfigError, match="num_processes=4 where a launcher started 8"):
        count_children(4, 8, "auto")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "blip2train.cli.main", *arguments]


def call(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=250)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_real_photographs_are_packed_captioned_by_two_processes_that_get_killed_and_trained_on(
    shared_data: Path, models: tuple[str, str], tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    (photos / "images").mkdir(parents=True)
    lines = (shared_data / "photos" / "captions.jsonl").read_text().splitlines()[:40]
    for line in lines:
        image = json.loads(line)["image"]
        shutil.copy(shared_data / "photos" / image, photos / image)
    (photos / "captions.jsonl").write_text("\n".join(lines) + "\n")
    packed = tmp_path / "packed"
    call("data", "pack", f"input={photos}", f"out={packed}", "shards.samples_per_shard=5", "workers=1")

    one = settings(packed, tmp_path / "one", *models, "batch_size=2")
    call("capfilt", *one)
    expected = content(tmp_path / "one")
    manifest = read_json(tmp_path / "one" / "manifest.json")
    assert manifest["num_records"] == 40
    assert manifest["counts"]["web_candidates"] > 150, "five human captions each"

    out = tmp_path / "data" / "photos"
    two = settings(packed, out, *models, "batch_size=2", "num_processes=2")
    for _ in range(2):
        victim = subprocess.Popen(command("capfilt", *two), env=ENVIRONMENT, start_new_session=True)
        before = len(list(out.glob("*.tar")))
        deadline = time.monotonic() + 100
        while len(list(out.glob("*.tar"))) < before + 2 and victim.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
    call("capfilt", *two)
    found = content(out)
    for files in (found, expected):
        assert files.pop("report.html"), "it names its folder"
    assert found == expected

    before, after = records(packed), records(out)
    assert list(before) == list(after)
    assert all(after[key]["jpg"] == record["jpg"] for key, record in before.items())
    run = tmp_path / "run"
    call(
        *("train", "experiment=photos_stage1", f"paths.data={tmp_path / 'data'}", f"run_dir={run}"),
        *(f"tokenizer.path={shared_data / 'tokenizers' / 'bert'}", "trainer.max_steps=3"),
        *("data.batch_size=8", "data.num_workers=0", "optim.warmup_steps=1", "num_threads=1", "log_every_steps=1"),
    )
    assert [row["step"] for row in RunDir(run).read_metrics()] == [1, 2, 3]
