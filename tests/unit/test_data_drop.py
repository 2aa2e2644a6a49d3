"""Accounts of dropped records: exact counts, a log on disk, and a stop with a report."""

import json
import logging
from pathlib import Path

import pytest

from blip2train.data.drop import DROP_CAUSES, Drop, DropLedger, shorten, summary
from blip2train.errors import DataError

ZEROS = {"used": 0, **dict.fromkeys(DROP_CAUSES, 0)}


def drop(cause: str = "corrupt_image", dataset: str = "coco", key: str = "k1", sample: int | None = None) -> Drop:
    return Drop(dataset, cause, "cut off", "x.tar", key, sample)


def test_used_and_dropped_add_up_to_drawn_for_each_dataset() -> None:
    ledger = DropLedger(["coco", "sbu"], minimum_records=1000)
    ledger.add({"coco": 5, "sbu": 2}, [drop(), drop("bad_json"), drop("bad_json", "sbu")])
    ledger.add({"coco": 3}, [drop()])
    assert ledger.counts() == {
        "coco": ZEROS | {"used": 5, "corrupt_image": 2, "bad_json": 1},
        "sbu": ZEROS | {"used": 1, "bad_json": 1},
    }


def test_drops_are_named_in_the_log_and_past_the_share_the_run_stops(caplog: pytest.LogCaptureFixture) -> None:
    ledger = DropLedger(["coco", "sbu"], max_dropped_share=0.1, minimum_records=20)
    with caplog.at_level(logging.WARNING):
        ledger.add({"coco": 20, "sbu": 100}, [drop(), drop("empty_caption", key="k2")])
    assert "x.tar key k1" in caplog.text and "corrupt_image" in caplog.text
    with pytest.raises(DataError, match="3 of 21 records of coco cannot be used") as caught:
        ledger.add({"coco": 1}, [drop(key="k3")])
    assert "x.tar key k3" in caught.value.where
    assert "sbu: 100 drawn, 100 used, 0 dropped" in caught.value.found
    assert "2 corrupt_image  e.g. x.tar key k1: cut off" in caught.value.found


def test_a_run_ends_with_a_line_for_each_dataset_that_lost_records() -> None:
    ledger = DropLedger(["coco", "sbu"])
    ledger.add({"coco": 8, "sbu": 2}, [drop(), drop("bad_json")])
    assert summary(ledger.counts()) == ["coco: 2 of 8 records dropped (25.0%): 1 corrupt_image, 1 bad_json"]


def test_the_log_names_ten_drops_and_says_where_the_others_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = DropLedger(["coco"], max_dropped_share=1.0, log=tmp_path / "dropped.jsonl")
    with caplog.at_level(logging.WARNING):
        ledger.add({"coco": 30}, [drop(key=f"k{number}") for number in range(30)])
    assert len(caplog.messages) == 11
    assert caplog.messages[-1] == f"coco: further drops are counted and named in {tmp_path / 'dropped.jsonl'}"


def test_a_share_is_judged_only_after_enough_records() -> None:
    ledger = DropLedger(["coco"], max_dropped_share=0.1, minimum_records=10)
    ledger.add({"coco": 9}, [drop()] * 9)
    with pytest.raises(DataError, match="9 of 10"):
        ledger.add({"coco": 1}, [])


def test_every_drop_is_a_row_of_the_log_and_the_stop_leaves_a_report(tmp_path: Path) -> None:
    path = tmp_path / "run" / "dropped.jsonl"
    ledger = DropLedger(["coco"], max_dropped_share=0.5, minimum_records=4, log=path)
    ledger.add({"coco": 4}, [drop(sample=3), drop("bad_text", key="k\udc80", sample=7)])
    rows = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert [(row["cause"], row["key"], row["sample"]) for row in rows] == [
        ("corrupt_image", "k1", 3),
        ("bad_text", "k\\udc80", 7),
    ]
    assert not (tmp_path / "run" / "data_report.json").exists()
    with pytest.raises(DataError):
        ledger.add({"coco": 1}, [drop()])
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    found = report["datasets"]["coco"]
    assert (found["drawn"], found["dropped"], found["counts"]["used"]) == (5, 3, 2)
    assert [example["key"] for example in found["examples"]["corrupt_image"]] == ["k1", "k1"]


def test_the_log_stops_growing_but_the_counts_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip2train.data.drop._MAX_LOG_ROWS", 3)
    ledger = DropLedger(["coco"], max_dropped_share=1.0, log=tmp_path / "dropped.jsonl")
    ledger.add({"coco": 8}, [drop()] * 5 + [drop("bad_json")] * 2)
    assert len((tmp_path / "dropped.jsonl").read_text().splitlines()) == 5
    assert ledger.counts()["coco"] == ZEROS | {"used": 1, "corrupt_image": 5, "bad_json": 2}


def test_a_resumed_ledger_goes_on_from_the_checkpoint_and_forgets_later_rows(tmp_path: Path) -> None:
    path = tmp_path / "dropped.jsonl"
    first = DropLedger(["coco"], max_dropped_share=1.0, log=path)
    first.add({"coco": 10}, [drop(sample=2, key="kept")])
    saved = first.counts()
    first.add({"coco": 10}, [drop(sample=15, key="comes again")])
    with path.open("a") as file:
        file.write('{"dataset": "co')  # killed while writing
    second = DropLedger(["coco", "new"], max_dropped_share=1.0, log=path)
    second.load(saved, num_samples=10)
    second.add({"coco": 10, "new": 1}, [drop(sample=15, key="comes again")])
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["kept", "comes again"]
    assert second.counts() == {"coco": ZEROS | {"used": 18, "corrupt_image": 2}, "new": ZEROS | {"used": 1}}


@pytest.mark.parametrize("text", ["a\nb", "a\x00b", "\ud800", "x" * 5000, "naïve"])
def test_details_are_one_printable_line(text: str) -> None:
    found = shorten(text)
    assert found.isprintable() and len(found) <= 300
    found.encode()
