"""Every logger says what metrics.jsonl says, of a run that was cut and resumed as of one that was not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_resume import cut

from blip2train.callback.wandb_logger import WandbRunLogger
from blip2train.cli.run_log import shown_settings
from blip2train.errors import ConfigError
from blip2train.run_dir import RunDir, read_json

SETTINGS = ("checkpoint.every_steps=3", "checkpoint.keep_last=0", "trainer.max_steps=6", "logger=[tensorboard,wandb]")


def numbers(rows: list[dict[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """Steps and values, without what loggers add of their own."""
    return [
        (int(row["step"]), {name: value for name, value in row.items() if name != "step" and not name.startswith("_")})
        for row in rows
    ]


def tensorboard_rows(folder: Path) -> list[dict[str, Any]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    table: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in table.setdefault(event.step, {}), f"{tag} twice at step {event.step}"
            table[event.step][tag] = event.value
    return [{"step": step} | row for step, row in sorted(table.items()) if row.keys() - {"epoch"}]


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """History records of an offline segment: protocol buffers in LevelDB's log format, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = next(folder.glob("*.wandb")).read_bytes()
    rows, place, whole = [], 7, b""
    while place + 7 < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                values = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in items}
                rows.append({"step": record.history.step.num} | values)
    return rows


def same(logged: list[dict[str, Any]], run: RunDir, rel: float) -> None:
    ours, theirs = numbers(run.read_metrics()), numbers(logged)
    assert [step for step, _ in theirs] == [step for step, _ in ours] == [1, 2, 3, 4, 5, 6]
    for (_, row), (_, twin) in zip(ours, theirs, strict=True):
        twin = {name: value for name, value in twin.items() if name != "trainer/global_step"}
        assert row.keys() == twin.keys()
        assert all(math.isclose(row[name], twin[name], rel_tol=rel) for name in row)


@pytest.fixture(scope="module")
def runs(laboratory, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, RunDir]:
    """A run of 6 steps, and one that was cut at step 3, its loggers at step 6, and resumed."""
    folder = tmp_path_factory.mktemp("loggers")
    whole = laboratory.train("microworld_stage1", folder / "whole", *SETTINGS).run
    resumed = cut(whole, "step-0000003", folder / "resumed")
    laboratory.train("microworld_stage1", resumed.path, *SETTINGS)
    return whole, resumed


def test_tensorboard_continues_its_curves_without_the_repeated_steps(runs: tuple[RunDir, RunDir]) -> None:
    for run in runs:
        same(tensorboard_rows(run.path / "tensorboard"), run, rel=1e-6)  # it keeps float32
    assert len(list((runs[1].path / "tensorboard").glob("events*"))) == 2
    folders = {path.name for path in runs[1].path.iterdir() if path.is_dir()}
    assert folders <= {"checkpoints", "ranks", "tensorboard", "wandb"}


def test_wandb_offline_is_one_run_whose_newest_segment_is_whole(runs: tuple[RunDir, RunDir]) -> None:
    whole, resumed = runs
    same(wandb_rows(whole.path / "wandb" / "latest-run"), whole, rel=1e-12)
    segments = sorted((resumed.path / "wandb").glob("offline-run-*"))
    own_id = resumed.wandb_id_path.read_text().strip()
    assert len(segments) == 2 and all(path.name.endswith(own_id) for path in segments)
    same(wandb_rows(segments[-1]), resumed, rel=1e-12)


class Server:
    """wandb that holds steps up to 5; `wandb.init` and its run in one."""

    step, offline = 6, False

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.rows: list[tuple[int, float]] = []
        self.codes: list[int] = []

    def init(self, **given: Any) -> "Server":
        self.started.append(given)
        return self

    def log(self, row: dict[str, float], step: int, commit: bool) -> None:
        assert commit
        self.rows.append((step, row["a"]))

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


def test_wandb_online_goes_on_in_the_run_and_logs_no_step_twice(tmp_path: Path, monkeypatch) -> None:
    server = Server()
    monkeypatch.setattr("wandb.init", server.init)
    RunDir(tmp_path).wandb_id_path.write_text("0123abcd\n")
    logger = WandbRunLogger(str(tmp_path), resume_step=3, offline=False, project="p")
    for step in range(4, 8):
        logger.log_metrics({"a": step / 10}, step=step)
    logger.finalize("failed")
    assert server.rows == [(6, 0.6), (7, 0.7)] and server.codes == [1]
    (given,) = server.started
    assert (given["id"], given["resume"], given["dir"]) == ("0123abcd", "allow", str(tmp_path))


def test_a_new_run_is_new_to_wandb_even_in_the_folder_of_one_that_never_got_far(tmp_path: Path, monkeypatch) -> None:
    server = Server()
    monkeypatch.setattr("wandb.init", server.init)
    for step in (0, 0, 3, 3):
        _ = WandbRunLogger(str(tmp_path), resume_step=step).experiment
    first, *others = (given["id"] for given in server.started)
    assert len(set(others)) == 1 and first != others[0] and len(first) == 8


def test_wandb_without_a_login_is_a_mistake_that_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    from wandb.errors import UsageError

    def refuse(**_: Any) -> None:
        raise UsageError("No API key configured.")

    monkeypatch.setattr("wandb.init", refuse)
    with pytest.raises(ConfigError, match="No API key") as caught:
        _ = WandbRunLogger(str(tmp_path), resume_step=0, offline=False).experiment
    assert "logger.wandb.offline=true" in str(caught.value) and not RunDir(tmp_path).wandb_id_path.exists()


def test_the_table_beside_the_jsonl_is_always_there(stage1_run: RunDir) -> None:
    header = stage1_run.metrics_table_path.read_text().splitlines()[0].split(",")
    assert header == list(stage1_run.read_metrics()[0])


def test_losses_stand_beside_their_chance_levels(stage1_run: RunDir, stage2_run: RunDir) -> None:
    first, last = stage1_run.read_metrics()[0], stage2_run.read_metrics()[-1]
    for run, row in ((stage1_run, first), (stage2_run, last)):
        levels = read_json(run.manifest_path)["chance_levels"]
        assert {f"train/{key.removeprefix('chance/')}": row[key] for key in row if "chance/" in key} == levels
    assert first["chance/itc_loss"] == pytest.approx(math.log(8)) and first["chance/itc_i2t_accuracy"] == 1 / 8
    assert {"train/itc_i2t_accuracy", "train/itc_t2i_accuracy", "train/itc_temperature"} <= first.keys()


def test_loggers_are_shown_the_config_without_keys_to_storage(laboratory, tmp_path: Path) -> None:
    dataset = "data.datasets.microworld"
    config = laboratory.compose("microworld_stage1", tmp_path, f"++{dataset}.storage_options={{token: 4711}}")
    shown = shown_settings(config)
    assert shown["optim"]["lr"] == config.optim.lr and shown["data"]["datasets"]["microworld"]["urls"]
    assert "4711" not in json.dumps(shown) and "4711" in str(config)
