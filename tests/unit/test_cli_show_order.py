"""`show order` prints what training will read, and says what it cannot take."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shard_factory import write_shards

from blip2train.cli.config import compose
from blip2train.cli.show_order import COLUMNS, show_order
from blip2train.errors import ConfigError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for place, path in enumerate(write_shards(folder / "microworld", [20, 20])):
        path.rename(path.with_name(f"train-{place:06d}.tar"))
    (folder / "microworld" / "index.json").unlink()
    return folder


def printed(data: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> list[list[str]]:
    settings = ["experiment=microworld_stage1", f"paths.data={data}", "run_dir=x", "data.batch_size=5", *overrides]
    show_order(compose("show_order", settings))
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert tuple(rows[0]) == COLUMNS
    return rows[1:]


def test_an_epoch_is_every_key_once(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(data, capsys, "steps=1..8")
    assert sorted(row[-1] for row in rows) == [f"r{number:06d}" for number in range(40)]
    assert [row[1] for row in rows] == [str(number) for number in range(40)]
    assert [row[0] for row in rows] == [str(1 + number // 5) for number in range(40)]
    assert {row[3] for row in rows} == {"0"}


def test_any_part_is_the_same_part(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(data, capsys, "steps=1..20")
    assert printed(data, capsys, "samples=37..61") == rows[37:62]
    assert printed(data, capsys, "steps=4") == rows[15:20]
    assert printed(data, capsys, "steps=2", "trainer.accumulate_grad_batches=3")[0][1:] == rows[15][1:]


@pytest.mark.parametrize("override", ["steps=0..3", "steps=3..2", "steps=a", "samples=-1..3", "steps=1.."])
def test_what_is_no_range_is_refused(data: Path, capsys: pytest.CaptureFixture[str], override: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(override)}"):
        printed(data, capsys, override)


def test_without_a_number_of_devices_samples_are_asked_for(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="decided at start"):
        printed(data, capsys, "trainer.devices=auto")
    assert [row[0] for row in printed(data, capsys, "trainer.devices=auto", "samples=0..1")] == ["", ""]


def test_the_command_line_takes_it(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blip2train.cli.show", "order", "experiment=microworld_stage1", "samples=0..3"]
    done = subprocess.run(
        [*command, f"paths.data={data}"], cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=True
    )
    assert len(done.stdout.splitlines()) == 5 and not list(tmp_path.iterdir())
