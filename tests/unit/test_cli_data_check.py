"""`data check` on a set with one of each defect: counts as planted, exit codes, JSON; clean data passes."""

import json
from pathlib import Path
from typing import Any

import pytest
from hostile_world import HostileWorld, build_hostile_world
from shard_factory import encode, noise, write_shards

from blip2train.cli.config import compose
from blip2train.cli.data_check import _percent, run
from blip2train.data.drop import DROP_CAUSES


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> HostileWorld:
    return build_hostile_world(tmp_path_factory.mktemp("hostile"))


def check(urls: Path, out: Path, *overrides: str) -> tuple[int, dict[str, Any]]:
    """(exit code, JSON report)."""
    config = compose("data_check", [f"urls={urls}", f"json={out}", "workers=1", *overrides])
    try:
        run(config)
    except SystemExit as leaving:
        assert isinstance(leaving.code, int)
        return leaving.code, json.loads(out.read_text())
    return 0, json.loads(out.read_text())


def counts(report: dict[str, Any]) -> dict[str, int]:
    return {row["finding"]: row["count"] for row in report["findings"]}


def test_check_counts_every_planted_defect_as_training_would(hostile: HostileWorld, tmp_path: Path) -> None:
    code, report = check(hostile.folder, tmp_path / "report.json")
    dropped = {name: count for name, count in counts(report).items() if name in DROP_CAUSES}
    assert code == 1
    assert dropped == hostile.planned
    assert report["num_records"] == hostile.num_records
    assert report["num_unusable"] == hostile.num_dropped
    for row in report["findings"]:
        assert 0 < len(row["examples"]) <= 5
        assert row["meaning"] and row["fix"] and row["count"] <= row["of"]


def test_budget_tolerates_unusable_records_up_to_its_share(hostile: HostileWorld, tmp_path: Path) -> None:
    share = hostile.num_dropped / hostile.num_records
    out = tmp_path / "report.json"
    assert check(hostile.folder, out, f"max_unusable_share={share + 0.001}")[0] == 0
    code, report = check(hostile.folder, out, f"max_unusable_share={share - 0.001}")
    assert code == 1
    assert set(report["errors"]) == set(hostile.planned)


def test_clean_shards_pass_and_strict_counts_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "clean", [4, 4])
    out = tmp_path / "report.json"
    assert check(tmp_path / "clean", out, "min_side=8")[0] == 0
    assert "8 records (0 unusable)" in capsys.readouterr().out
    code, report = check(tmp_path / "clean", out)
    assert (code, counts(report)["tiny_image"]) == (0, 8)
    code, report = check(tmp_path / "clean", out, "strict=true")
    assert (code, report["errors"]) == (1, ["tiny_image"])


def test_captions_cannot_write_markup_or_control_codes_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = "[bold]x[/nothing] \x1b[31m " + "word " * 60
    from shard_factory import write_tar

    content = json.dumps({"captions": [nasty]}).encode()
    write_tar(tmp_path / "data" / "s-000.tar", [("x.png", encode(noise(0))), ("x.json", content)])
    check(tmp_path / "data", tmp_path / "report.json")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "[bold]x[/nothing]" in printed


@pytest.mark.parametrize(("override", "message"), [("level=deep", "level 'deep'"), ("workers=0", "workers=0")])
def test_wrong_settings_say_what_is_right(override: str, message: str, tmp_path: Path) -> None:
    from blip2train.errors import ConfigError

    write_shards(tmp_path, [1])
    with pytest.raises(ConfigError, match=message):
        run(compose("data_check", [f"urls={tmp_path}", override]))


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100"), (2.5, "250"), (0.333, "33"), (0.0131, "1.3"), (0.0001, "0.01")]
)
def test_shares_have_no_exponent(share: float, text: str) -> None:
    assert _percent(share) == text
