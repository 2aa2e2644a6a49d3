"""metrics.jsonl and metrics.csv say the same, whatever happened to the run before."""

import csv
import json
import resource
from pathlib import Path

import pytest

from blip2train.callback.file_logger import FileLogger
from blip2train.errors import DataError
from blip2train.run_dir import RunDir


def table(run: RunDir) -> list[dict[str, float]]:
    """The CSV as a reader without knowledge of the project sees it; empty cells left out."""
    with run.metrics_table_path.open(newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def logged(run: RunDir, rows: dict[int, dict[str, float]], resume_step: int = 0) -> RunDir:
    logger = FileLogger(run, resume_step=resume_step)
    for step, row in rows.items():
        logger.log_metrics(row, step=step)
    return run


def test_both_files_hold_every_value_to_the_last_bit(tmp_path: Path) -> None:
    run = logged(RunDir(tmp_path), {1: {"a": 0.1 + 0.2, "b": 1e-300}, 2: {"a": 1 / 3, "b": float("inf")}})
    assert run.read_metrics() == table(run)
    assert table(run)[0] == {"step": 1, "a": 0.1 + 0.2, "b": 1e-300}


def test_a_quantity_that_appears_later_gets_a_column(tmp_path: Path) -> None:
    run = logged(RunDir(tmp_path), {1: {"a": 1.0}, 2: {"a": 2.0, "late": 5.0}, 3: {"a": 3.0}})
    assert table(run) == run.read_metrics() == [
        {"step": 1, "a": 1.0}, {"step": 2, "a": 2.0, "late": 5.0}, {"step": 3, "a": 3.0}
    ]  # fmt: skip
    assert run.metrics_table_path.read_text().splitlines()[0] == "step,a,late"


def test_resuming_takes_back_the_steps_that_are_repeated(tmp_path: Path) -> None:
    run = logged(RunDir(tmp_path), {1: {"a": 1.0}, 2: {"a": 2.0}, 3: {"a": 3.0, "b": 1.0}})
    logged(run, {3: {"a": 3.0}, 4: {"a": 4.0}}, resume_step=2)
    assert table(run) == run.read_metrics() == [{"step": step, "a": float(step)} for step in (1, 2, 3, 4)]
    assert run.metrics_table_path.read_text().splitlines()[0] == "step,a"


def test_nothing_is_taken_back_before_the_run_goes_on(tmp_path: Path) -> None:
    run = logged(RunDir(tmp_path), {1: {"a": 1.0}, 2: {"a": 2.0}})
    FileLogger(run, resume_step=1)  # and then something refuses the start
    assert [row["step"] for row in run.read_metrics()] == [1, 2]


@pytest.mark.parametrize("cut", [1, 9, 15])
def test_a_line_cut_by_a_kill_is_left_out_and_repaired(tmp_path: Path, cut: int) -> None:
    run = logged(RunDir(tmp_path), {1: {"a": 1.0}, 2: {"a": 2.0}})
    for path in (run.metrics_path, run.metrics_table_path):
        path.write_bytes(path.read_bytes()[:-cut])
    whole = run.read_metrics()
    assert [row["step"] for row in whole] == ([1, 2] if cut == 1 else [1]), "only the line's end is missing, or more"
    logged(run, {3: {"a": 3.0}}, resume_step=2)
    assert table(run) == run.read_metrics() == [*whole, {"step": 3, "a": 3.0}]


def test_a_lost_table_is_made_anew(tmp_path: Path) -> None:
    run = logged(RunDir(tmp_path), {1: {"a": 1.0}})
    run.metrics_table_path.unlink()
    logged(run, {2: {"a": 2.0}}, resume_step=1)
    assert table(run) == run.read_metrics() and len(table(run)) == 2


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.metrics_path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "tr\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2 is no JSON"):
        run.read_metrics()


def test_a_full_disk_delays_rows_and_loses_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, logger = RunDir(tmp_path), FileLogger(RunDir(tmp_path))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for step in range(1, 9):
        # in the midst of a row's text; the table is the shorter file, and is hit later
        resource.setrlimit(resource.RLIMIT_FSIZE, (45 if step in (2, 3) else 75 if step == 5 else hard, hard))
        try:
            logger.log_metrics({"loss": float(step)}, step=step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        rows = [row["step"] for row in run.read_metrics()]
        assert rows == list(range(1, {2: 1, 3: 1, 5: 4}.get(step, step) + 1))
    assert table(run) == run.read_metrics() and len(table(run)) == 8
    assert caplog.text.count("cannot be written (") == 2


def test_rows_that_no_disk_took_are_said_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = FileLogger(RunDir(tmp_path / "file"))
    (tmp_path / "file").write_text("a file where the run folder should be")
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.log_metrics({"loss": 2.0}, step=2)
    logger.finalize("success")
    assert caplog.text.count("cannot be written") == 1 and "2 rows of" in caplog.text
