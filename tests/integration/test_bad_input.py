"""What a user can get wrong ends in one clear message, or is counted; never in a traceback, never in silence."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from blip2train.errors import Blip2TrainError, ConfigError, DataError
from blip2train.run_dir import read_json


def command_line(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    verb, *rest = arguments
    return subprocess.run(
        [sys.executable, "-m", f"blip2train.cli.{verb}", *rest],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def with_damage(laboratory, out: Path, damage) -> Path:
    """A copy of the data whose first training shard went through `damage(name, content) -> content`."""
    import io

    shutil.copytree(laboratory.data, out)
    shard = out / "microworld" / "train-000000.tar"
    with tarfile.open(shard) as source:
        members = [(member.name, source.extractfile(member).read()) for member in source if member.isfile()]
    with tarfile.open(shard, "w") as target:
        for name, content in members:
            changed = damage(name, content)
            info = tarfile.TarInfo(name)
            info.size = len(changed)
            target.addfile(info, io.BytesIO(changed))
    return out


def test_mistyped_override_says_which_keys_exist(tmp_path: Path) -> None:
    done = command_line("train", "experiment=microworld_stage1", "optim.lrr=1", cwd=tmp_path)
    assert done.returncode == 1
    assert "there is no 'lrr' in optim" in done.stderr and "Did you mean optim.lr?" in done.stderr
    assert "Traceback" not in done.stderr


def test_stage2_without_stage1_weights_is_one_message(tmp_path: Path) -> None:
    done = command_line("train", "experiment=microworld_stage2_opt", cwd=tmp_path)
    assert done.returncode == 2
    assert "ConfigError: stage 2 has no stage-1 weights" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("config.yaml"))


def test_missing_shards_are_named_before_anything_is_built(laboratory, tmp_path: Path) -> None:
    with pytest.raises(Blip2TrainError, match=r"train-\*\.tar"):
        laboratory.train("microworld_stage1", tmp_path / "run", f"paths.data={tmp_path}/nowhere")
    assert not (tmp_path / "run").exists()


def test_a_few_corrupt_images_are_counted_and_training_goes_on(laboratory, tmp_path: Path) -> None:
    def truncate(name: str, content: bytes) -> bytes:
        return content[: len(content) // 3] if name in ("train_000003.jpg", "train_000009.jpg") else content

    data = with_damage(laboratory, tmp_path / "data", truncate)
    run = laboratory.train("microworld_stage1", tmp_path / "run", f"paths.data={data}", "trainer.max_steps=12").run
    counts = read_json(run.manifest_path)["data"]["microworld"]
    assert counts["corrupt_image"] >= 2 and sum(counts.values()) == 12 * 8


def test_mostly_corrupt_images_stop_the_run_with_their_shard(laboratory, tmp_path: Path) -> None:
    data = with_damage(
        laboratory, tmp_path / "data", lambda name, content: b"no image" if name.endswith("jpg") else content
    )
    with pytest.raises(DataError, match="microworld"):
        laboratory.train("microworld_stage1", tmp_path / "run", f"paths.data={data}", "trainer.max_steps=14")


def test_empty_captions_are_counted(laboratory, tmp_path: Path) -> None:
    def empty(name: str, content: bytes) -> bytes:
        return b'{"captions": ["  "]}' if name == "train_000004.json" else content

    data = with_damage(laboratory, tmp_path / "data", empty)
    run = laboratory.train("microworld_stage1", tmp_path / "run", f"paths.data={data}", "trainer.max_steps=12").run
    assert read_json(run.manifest_path)["data"]["microworld"]["empty_caption"] >= 1


def test_image_size_the_encoder_was_not_built_for(laboratory, tmp_path: Path) -> None:
    wrong = ["data.datasets.microworld.transform.spec=${other}", "+other._target_=blip2train.batch.ImageSpec"]
    wrong += ["+other.size=32", "+other.mean=[0.5,0.5,0.5]", "+other.std=[0.5,0.5,0.5]"]
    with pytest.raises(ConfigError, match=r"32x32 pixels.*built for 64x64"):
        laboratory.train("microworld_stage1", tmp_path / "run", *wrong)


def test_full_disk_is_refused_before_the_first_step(laboratory, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("blip2train.callback.checkpoint.free_bytes", lambda folder: 1_000_000)
    with pytest.raises(ConfigError, match=r"checkpoints need .* MB, 1 MB are free"):
        laboratory.train("microworld_stage1", tmp_path / "run")


def test_disk_that_fills_up_costs_a_checkpoint_and_not_the_run(laboratory, tmp_path: Path, monkeypatch, caplog) -> None:
    from blip2train.checkpoint import io

    genuine, calls = io.save_file, []

    def fills_up(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return genuine(*arguments, **options)

    monkeypatch.setattr(io, "save_file", fills_up)
    every_step = ("checkpoint.every_steps=1", "checkpoint.keep_last=0")
    outcome = laboratory.train("microworld_stage1", tmp_path / "run", *every_step)
    assert (outcome.step, outcome.exit_code) == (4, 0)
    assert "the disk is full" in caplog.text and "training goes on; step 3 tries again" in caplog.text
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-0000001", "step-0000003", "step-0000004"]


def test_packing_skips_and_names_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.jpg").write_text("not an image")
    (tmp_path / "in" / "captions.jsonl").write_text('{"image": "notes.jpg", "caption": "a note"}\n')
    done = command_line("data", "pack", "input=in", "out=out", cwd=tmp_path)
    assert done.returncode == 2
    assert "DataError" in done.stderr and "Traceback" not in done.stderr
