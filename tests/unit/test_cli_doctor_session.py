"""A check that breaks is a row and not the end; rows of several machines come together; children leave nothing."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from blip2train.cli.config import compose
from blip2train.cli.doctor import session
from blip2train.cli.doctor.child import Outcome, last_words, run_children
from blip2train.cli.doctor.context import Context
from blip2train.cli.doctor.launch import Launch, Meeting, free_port, join_launch
from blip2train.cli.doctor.row import Row, merge_nodes, run_apart, worst
from blip2train.cli.doctor.session import Check, choose, run_checks
from blip2train.cli.doctor.step import quoted, training_arguments
from blip2train.cli.doctor.table import LiveTable
from blip2train.errors import ConfigError, DataError


def test_rows_before_an_error_are_kept_and_ours_says_what_to_do() -> None:
    def check() -> Iterator[Row]:
        yield Row("disk", "ok", "first")
        raise DataError("torn", where="shard 3", fix="copy it again")

    first, second = run_apart("disk", check, 5)
    assert first.measured == "first"
    assert (second.status, second.measured, second.advice) == ("fail", "torn (shard 3)", "copy it again")


def test_a_crash_is_a_row_that_names_it() -> None:
    def check() -> Iterator[Row]:
        raise ZeroDivisionError("by nothing")
        yield

    (row,) = run_apart("memory", check, 5)
    assert row.status == "fail" and row.measured == "ZeroDivisionError: by nothing"


def test_a_check_that_hangs_is_left_behind() -> None:
    release = threading.Event()

    def check() -> Iterator[Row]:
        yield Row("disk", "ok", "before")
        release.wait(20)

    start = time.monotonic()
    rows = run_apart("disk", check, 0.2)
    release.set()
    assert time.monotonic() - start < 5
    assert [row.status for row in rows] == ["ok", "fail"] and "no end after" in rows[1].measured


def test_machines_that_agree_are_said_once_and_others_by_name() -> None:
    same, here, there = Row("disk", "ok", "same"), Row("devices", "ok", "8 GPUs"), Row("devices", "fail", "7 GPUs")
    merged = merge_nodes([("a", [same, here]), ("b", [same, there])])
    assert merged == [same, Row("devices", "ok", "a: 8 GPUs"), Row("devices", "fail", "b: 7 GPUs")]
    assert worst(merged) == "fail" and worst([]) == "ok"


def test_an_unknown_check_is_refused_and_config_is_always_run() -> None:
    assert choose(["step"], []) == ["config", "step"]
    assert "step" not in choose([], ["step", "memory"]) and len(choose([], ["step"])) == len(session.CHECKS) - 1
    with pytest.raises(ConfigError, match="'stepp'"):
        choose(["stepp"], [])


def good(context: Context) -> Iterator[Row]:
    yield Row("weights", "ok", "there")


def with_a_warning(context: Context) -> Iterator[Row]:
    yield Row("weights", "warn", "to be fetched")


def crashing(context: Context) -> Iterator[Row]:
    raise RuntimeError("boom")
    yield


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(compose("doctor", ["experiment=microworld_stage1", f"run_dir={tmp_path / 'run'}"]), Launch())


@pytest.mark.parametrize(
    ("function", "step_is_tried"), [("good", True), ("with_a_warning", False), ("crashing", False)]
)
def test_a_check_waits_for_those_it_needs(
    context: Context, monkeypatch: pytest.MonkeyPatch, function: str, step_is_tried: bool
) -> None:
    monkeypatch.setattr(Check, "load", lambda self: globals()[self.function])
    tried = Check("", "", "good", scope="process", children=True, needs_ok=("weights",))
    after = Check("", "", "good", needs=("step",))
    monkeypatch.setattr(session, "CHECKS", {"weights": Check("", "", function), "step": tried, "time": after})
    rows = run_checks(["weights", "step", "time"], context, LiveTable(shown=False))
    assert [row.status == "skip" for row in rows[1:]] == [not step_is_tried] * 2
    assert context.meeting is None and list(context.run_dir.parent.iterdir()) == []


def test_a_run_folder_that_cannot_be_made_fails_the_checks_that_start_processes(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(session.tempfile, "mkdtemp", refuse)
    (row,) = session.run_check("step", context, {}, LiveTable(shown=False))
    assert row.status == "fail" and "Permission denied" in row.measured


def test_the_processes_of_a_launch_exchange_plain_values() -> None:
    port, world = free_port(), 3
    gathered: list[list[object]] = [[] for _ in range(world)]

    def rank(number: int) -> None:
        store = dist.TCPStore("127.0.0.1", port, world, is_master=number == 0, wait_for_workers=False)
        launch = Launch(number, world, number, store=store, timeout_s=20)
        gathered[number] = [launch.gather({"rank": number}), launch.from_main([number])]
        launch.gather(None)  # rank 0 holds the store

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert gathered == [[[{"rank": 0}, {"rank": 1}, {"rank": 2}], [0]]] * world


def test_a_process_that_is_gone_does_not_hang_the_others() -> None:
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    with pytest.raises(ConfigError, match="waited"):
        Launch(0, 2, 0, store=store, timeout_s=0.3).gather("alone")


def test_a_slurm_job_without_tasks_per_node_is_refused_as_training_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PROCID": "1", "NTASKS": "2", "LOCALID": "1", "JOB_ID": "4711", "JOB_NAME": "x"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(ConfigError, match="ntasks-per-node"):
        join_launch(1.0)


def test_help_waits_for_no_torch() -> None:
    code = "import sys, blip2train.cli.doctor.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_children_of_a_launch_meet_elsewhere_than_the_launcher() -> None:
    environment = Meeting("node1", 4711, "/folder").child_environment()
    assert environment["MASTER_ADDR"] == "node1" and environment["MASTER_PORT"] == "4711"
    assert environment["TORCHELASTIC_USE_AGENT_STORE"] == "False"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def start(folder: Path, code: str, number: int = 1, seconds: float = 30, alarm: Path | None = None) -> Outcome:
    (folder / "doctored.py").write_text(code, encoding="utf-8")
    places = [{**os.environ, "RANK": str(rank)} for rank in range(number)]
    return run_children(["doctored"], places, folder / "log", seconds, lambda text: None, alarm, 0.3)


def test_a_child_that_ends_well_is_good(modules: Path) -> None:
    outcome = start(modules, "print('all is well')", number=2)
    assert outcome.good and outcome.codes == (0, 0) and "all is well" in outcome.log


def test_a_child_that_fails_takes_those_along_that_wait_for_it(modules: Path) -> None:
    code = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('ValueError: out of luck')\ntime.sleep(60)"
    begun = time.monotonic()
    outcome = start(modules, code, number=2)
    assert time.monotonic() - begun < 20
    assert not outcome.good and last_words(outcome)[0] == "ValueError: out of luck"


def test_nothing_that_a_child_started_outlives_it(modules: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(60)"
    )
    outcome = start(modules, code, seconds=1.5)
    assert outcome.codes == (None,)
    found, advice = last_words(outcome)
    assert "no end after" in found and "check_minutes" in advice
    grandchild = int(outcome.log.split()[0])
    deadline = time.monotonic() + 10
    while _lives(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(grandchild)


def _lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_failure_on_another_machine_stops_the_child_here(modules: Path) -> None:
    alarm = modules / "alarm"
    alarm.touch()
    outcome = start(modules, "import time; time.sleep(60)", alarm=alarm)
    assert not outcome.good and outcome.stopped_by_others
    alarm.unlink()
    outcome = start(modules, "raise SystemExit(3)", alarm=alarm)
    assert alarm.exists() and not outcome.stopped_by_others


@pytest.mark.parametrize(
    ("codes", "log", "found", "advice"),
    [
        ((2,), "\nDataError: no shard\n  where: urls=x\n  fix:   pack it\n", "no shard (urls=x)", "pack it"),
        (
            (2,),
            "ConfigError: out\n  of it\n  where: y\n  fix:   one of:\n         a=1\n         b=2\nX\n",
            "out of it (y)",
            "one of: a=1 b=2",
        ),
        ((1,), "Traceback ...\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n", "OutOfMemoryError", "log"),
        ((-9,), "step 1\n", "SIGKILL", "main memory"),
        ((-11,), "step 1\n", "SIGSEGV: step 1", "log"),
        ((1,), "", "it wrote nothing", "log"),
    ],
)
def test_the_last_words_of_a_child(codes: tuple[int], log: str, found: str, advice: str) -> None:
    said = last_words(Outcome(codes, log, 3.0))
    assert found in said[0] and advice in said[1]


def test_the_tried_training_has_the_users_overrides_and_its_own_folder() -> None:
    own = ["experiment=microworld_stage1", "--config-dir=mine", "optim.lr=1", "~benchmark"]
    asked = [
        *own,
        "run_dir=r",
        "logger=wandb",
        "logger.wandb.project=x",
        "+logger=csv",
        "out=o",
        "skip=[time]",
        "steps=2",
    ]
    given = training_arguments(asked, Path("/t/run"), Path("/t/it's"), 2)
    assert given[: len(own)] == own
    assert given[len(own) :][:3] == ["run_dir='/t/run'", "resume=never", "logger=[]"]
    config = compose("train", [*own[:1], *given[len(own) :]])
    assert config.callback.doctor.steps == 2 and config.callback.doctor.out == "/t/it's"
    assert not config.get("logger") and str(config.run_dir) == "/t/run"
    assert "resume='/r/step-0000002'" in training_arguments([], Path("r"), Path("m"), 2, Path("/r/step-0000002"))


def test_a_path_survives_the_grammar_of_overrides() -> None:
    for path in ("/a b/c=d,e", "/it's", "/[x]{y}:z", "/a\\b"):
        assert str(compose("train", ["experiment=microworld_stage1", f"run_dir={quoted(path)}"]).run_dir) == path


def test_rows_are_shown_as_they_come_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    table = LiveTable()
    table.add([Row("disk", "ok", "46 GB [free]")])
    shown = capsys.readouterr().out
    assert "what to do" in shown and "46 GB [free]" in shown
    table.add([Row("weights", "fail", "none", "fetch them")])
    table.finish([Row("disk", "ok", ""), Row("weights", "fail", "")])
    shown = capsys.readouterr().out
    assert "what to do" not in shown and "fetch them" in shown and "1 ok, 1 failed" in shown
    LiveTable(shown=False).add([Row("disk", "ok", "silent")])
    assert capsys.readouterr().out == ""
