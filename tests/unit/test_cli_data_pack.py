"""What `blip2train data pack` prints, and whether what it advises can be done."""

import json
import shlex
from pathlib import Path

import pytest
from shard_factory import encode, noise

from blip2train.cli import data_pack
from blip2train.cli.config import compose
from blip2train.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, one with a name that a table could take for markup, and a line without its image."""
    rows = [{"image": f"{name}.jpg", "caption": "x"} for name in ("0", "1", "[/gone]", "[red]")]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("0", "1", "[red]"):
        (tmp_path / f"{name}.jpg").write_bytes(encode(noise(0), "jpg"))
    return tmp_path


def test_the_table_and_the_advice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "my-shards"
    data_pack.run(compose("data_pack", [f"input={folder}", f"out={out}", "workers=1"]))
    printed = capsys.readouterr().out
    assert "│ records" in printed and "missing_image" in printed and "[/gone].jpg" in printed
    advice = dict(line.split(":  ", 1) for line in printed.splitlines() if line.startswith(("check:", "train:")))
    assert compose("data_check", shlex.split(advice["check"])[3:]).urls == [f"{out}/*.tar"]
    config = compose("train", shlex.split(advice["train"].replace("...", "microworld_stage1"))[2:])
    added = config.data.datasets.my_shards
    assert (added.name, added.urls) == ("my_shards", [f"{out}/*.tar"])


@pytest.mark.parametrize(("name", "key"), [("ünï, ö", "_n____"), ("2024a", "data_2024a")])
def test_the_advice_fits_any_folder_name(name: str, key: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_pack.run(compose("data_pack", [f"input={folder}", f"out='{folder}/{name}'", "workers=1"]))
    check, train = (shlex.split(line.split(":  ", 1)[1]) for line in capsys.readouterr().out.splitlines()[-2:])
    assert compose("data_check", check[3:]).urls == [f"{folder}/{name}/*.tar"]
    config = compose(
        "train", [part for part in train[2:] if part != "experiment=..."] + ["experiment=microworld_stage1"]
    )
    assert config.data.datasets[key].urls == [f"{folder}/{name}/*.tar"]


@pytest.mark.parametrize("workers", [0, -1])
def test_no_process_is_too_few(workers: int, folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"workers={workers}"):
        data_pack.run(compose("data_pack", [f"input={folder}", f"out={folder}/out", f"workers={workers}"]))


def test_the_shards_of_a_shipped_data_set_take_its_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_pack.run(compose("data_pack", [f"input={folder}", f"out={folder}/coco", "workers=1"]))
    advice = capsys.readouterr().out.splitlines()[-1].removeprefix("train:  blip2train train ")
    config = compose("train", shlex.split(advice.replace("...", "microworld_stage1")))
    assert (config.data.datasets.coco.name, config.data.datasets.coco.weight) == ("coco", 0.113)


def test_too_much_left_out_is_an_error_unless_allowed(folder: Path) -> None:
    arguments = [f"input={folder}", f"out={folder}/out", "workers=1", "max_skipped_share=0.2"]
    with pytest.raises(DataError, match="1 of 4 rows are left out"):
        data_pack.run(compose("data_pack", arguments))
    data_pack.run(compose("data_pack", [*arguments[:-1], "max_skipped_share=0.25"]))
    assert (folder / "out" / "manifest.json").is_file()
