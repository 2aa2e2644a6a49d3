"""Every logger says what metrics.jsonl says, of a run that was cut and resumed as of one that was not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_resume import cut

from blip2train.run_dir import RunDir, read_json

SETTINGS = ("checkpoint.every_steps=3", "checkpoint.keep_last=0", "trainer.max_steps=6")


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
    """History records of an offline segment, by wandb's own reader."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(next(folder.glob("*.wandb"))))
    rows = []
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {
                (item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item
            }
            rows.append({"step": record.history.step.num} | items)
    return rows


def same(logged: list[dict[str, Any]], run: RunDir, rel: float) -> None:
    ours, theirs = numbers(run.read_metrics()), numbers(logged)
    assert [step for step, _ in theirs] == [step for step, _ in ours] == [1, 2, 3, 4, 5, 6]
    for (_, row), (_, twin) in zip(ours, theirs, strict=True):
        twin = {name: value for name, value in twin.items() if name != "trainer/global_step"}
        assert row.keys() == twin.keys()
        assert all(math.isclose(row[name], twin[name], rel_tol=rel) for name in row)


def test_tensorboard_continues_its_curves_without_the_repeated_steps(laboratory, tmp_path: Path) -> None:
    whole = laboratory.train("microworld_stage1", tmp_path / "whole", *SETTINGS, "logger=tensorboard").run
    same(tensorboard_rows(whole.path / "tensorboard"), whole, rel=1e-6)  # it keeps float32
    resumed = cut(whole, "step-0000003", tmp_path / "resumed")  # its event files go to step 6
    laboratory.train("microworld_stage1", resumed.path, *SETTINGS, "logger=tensorboard")
    same(tensorboard_rows(resumed.path / "tensorboard"), resumed, rel=1e-6)
    assert len(list((resumed.path / "tensorboard").glob("events*"))) == 2
    assert sorted(path.name for path in resumed.path.iterdir() if path.is_dir()) == ["checkpoints", "tensorboard"]


@pytest.mark.slow
def test_wandb_offline_is_one_run_whose_newest_segment_is_whole(laboratory, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    whole = laboratory.train("microworld_stage1", tmp_path / "whole", *SETTINGS, "logger=wandb").run
    same(wandb_rows(whole.path / "wandb" / "latest-run"), whole, rel=1e-12)
    resumed = cut(whole, "step-0000003", tmp_path / "resumed")
    laboratory.train("microworld_stage1", resumed.path, *SETTINGS, "logger=wandb")
    segments = sorted((resumed.path / "wandb").glob("offline-run-*"))
    assert len(segments) == 2 and all(
        path.name.endswith(resumed.wandb_id_path.read_text().strip()) for path in segments
    )
    same(wandb_rows(segments[-1]), resumed, rel=1e-12)
    again = laboratory.train("microworld_stage1", tmp_path / "other", "trainer.max_steps=1", "logger=wandb").run
    assert again.wandb_id_path.read_text() != whole.wandb_id_path.read_text(), "another run of the same process"


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
