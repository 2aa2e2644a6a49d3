"""A file that cannot be written is refused before the shards are read, not after hours of reading."""

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig
from shard_factory import write_shards

from blip2train.cli import data_check, data_index, data_view
from blip2train.cli.config import compose
from blip2train.data import index_shards, inspection
from blip2train.errors import ConfigError

VERBS: dict[str, tuple[Callable[[DictConfig], None], str]] = {
    "data_view": (data_view.run, "out"),
    "data_check": (data_check.run, "json"),
    "data_index": (data_index.run, "out"),
}


@pytest.fixture
def unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shards of which none may be read."""

    def read(*arguments: object, **options: object) -> None:
        pytest.fail("a shard was read")

    monkeypatch.setattr(inspection, "inspect_shards", read)
    monkeypatch.setattr(index_shards, "scan_shard", read)
    write_shards(tmp_path / "shards", [1])
    return tmp_path / "shards"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("folder", "a folder where a file is to be written"),
        ("file/below/x", "Not a directory"),
        ("n" * 300, "File name too long"),
        ("/proc/read-only", "cannot be written"),
        ("/dev/null", "a device or pipe"),
    ],
)
@pytest.mark.parametrize("verb", VERBS)
def test_an_output_that_cannot_be_written_is_said_first(
    verb: str, name: str, found: str, unread: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    run, key = VERBS[verb]
    with pytest.raises(ConfigError, match=found) as error:
        run(compose(verb, [f"urls={unread}", f"{key}={tmp_path / name}", "workers=1"]))
    assert error.value.where == f"{key}={tmp_path / name}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "shards"]


def test_an_index_that_cannot_lie_beside_its_shards_is_said_first(unread: Path) -> None:
    (unread / "index.json").unlink(missing_ok=True)
    (unread / "index.json").mkdir()
    with pytest.raises(ConfigError, match="a folder where a file") as error:
        data_index.run(compose("data_index", [f"urls={unread}", "workers=1"]))
    assert error.value.where == "out=null (beside the shards)"


@pytest.mark.parametrize("verb", ["data_view", "data_check"])
def test_the_trial_leaves_a_file_that_is_there_as_it_was(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written before is lost only once there is something better."""

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "inspect_shards", stop)
    write_shards(tmp_path / "shards", [1])
    (tmp_path / "out").write_text("of yesterday")
    run, key = VERBS[verb]
    with pytest.raises(KeyboardInterrupt):
        run(compose(verb, [f"urls={tmp_path / 'shards'}", f"{key}={tmp_path / 'out'}", "workers=1"]))
    assert (tmp_path / "out").read_text() == "of yesterday"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "shards"]
