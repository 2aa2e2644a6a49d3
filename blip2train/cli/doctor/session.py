"""The checks in their order, and how one of them is run over all processes of a launch."""

from __future__ import annotations

import functools
import importlib
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blip2train.cli.doctor.context import Context
from blip2train.cli.doctor.launch import Launch, Meeting, free_port
from blip2train.cli.doctor.row import Row, Status, merge_nodes, run_apart, worst
from blip2train.cli.doctor.table import LiveTable
from blip2train.errors import ConfigError

Scope = Literal["machine", "process", "main"]
Function = Callable[[Context], Iterable[Row]]


@dataclass(frozen=True, slots=True)
class Check:
    """A check and when it is run.

    Args:
        title: what it does, for the line that is shown meanwhile.
        module, function: where it is; imported only then.
        scope: run by one process per machine, by every process, or by rank 0.
        children: it starts processes, which need a place to meet.
        needs: checks that must not have failed before it.
        needs_ok: checks that must have gone well.
    """

    title: str
    module: str
    function: str
    scope: Scope = "machine"
    children: bool = False
    needs: tuple[str, ...] = ()
    needs_ok: tuple[str, ...] = ()

    def load(self) -> Function:
        function: Function = getattr(importlib.import_module(f"blip2train.cli.doctor.{self.module}"), self.function)
        return function

    def waits_for(self, before: Mapping[str, Status]) -> list[str]:
        """The checks whose result forbids this one."""
        bad = [name for name in self.needs if before.get(name, "ok") in {"fail", "skip"}]
        return bad + [name for name in self.needs_ok if before.get(name, "ok") != "ok"]


CHECKS: dict[str, Check] = {
    "config": Check("looking at the config", "config", "check_config", scope="process"),
    "versions": Check("looking at versions", "versions", "check_versions"),
    "devices": Check("looking at devices", "devices", "check_devices"),
    "disk": Check("writing to the disk", "disk", "check_disk", needs=("config",)),
    "weights": Check("looking for weights", "weights", "check_weights"),
    "shards": Check("reading shards", "shards", "check_shards", needs=("config",)),
    "step": Check(
        *("trying some steps", "step", "check_step", "process", True),
        needs=("config", "versions", "devices", "disk", "shards"),
        needs_ok=("weights",),  # a warning there is a download, which is not the doctor's to start
    ),
    "memory": Check("estimating memory", "memory", "check_memory", needs=("config",)),
    "interconnect": Check(
        *("measuring the interconnect", "interconnect", "check_interconnect", "process", True),
        needs=("config", "devices"),
    ),
    "time": Check("estimating the duration", "duration", "check_time", scope="main", needs=("step",)),
}
"""In the order in which they run: what a later one needs is measured before."""


def choose(only: list[str], skip: list[str]) -> list[str]:
    """The checks to run, in order; "config" always, since the others rest on it.

    Raises:
        ConfigError: a name that no check has.
    """
    unknown = [name for name in [*only, *skip] if name not in CHECKS]
    if unknown:
        raise ConfigError(
            f"no check is called {', '.join(map(repr, unknown))}", where="only, skip", fix=f"one of {', '.join(CHECKS)}"
        )
    return [name for name in CHECKS if name == "config" or (name not in skip and (not only or name in only))]


def run_checks(names: list[str], context: Context, table: LiveTable) -> list[Row]:
    """Run checks in order and show their rows as they come; the same rows on every rank."""
    rows: list[Row] = []
    for name in names:
        before = {row.check: worst(each for each in rows if each.check == row.check) for row in rows}
        found = run_check(name, context, before, table)
        table.add(found)
        rows += found
    table.finish(rows)
    return rows


def run_check(name: str, context: Context, before: Mapping[str, Status], table: LiveTable) -> list[Row]:
    """The rows of one check over all machines; the same on every rank."""
    one, launch = CHECKS[name], context.launch
    refused = one.waits_for(before)
    if refused:
        return [Row(name, "skip", f"not tried: see {', '.join(refused)} above", "correct that, and ask again")]
    problem = _meet(context) if one.children else None
    if problem is not None:
        return [Row(name, "fail", problem, "choose a run_dir= that every machine can write to")]
    takes_part = {"machine": launch.leads_machine, "process": True, "main": launch.is_main}[one.scope]
    own: list[Row] = []
    with table.working(one.title) as context.say:
        if takes_part:
            own = run_apart(name, functools.partial(one.load(), context), context.seconds)
        gathered = launch.gather([_here(launch), [row.as_json() for row in own]])
    if one.children:
        _part(context)
    found = [(node, [Row(**row) for row in rows]) for node, rows in gathered if rows]
    return merge_nodes(found) + (_clocks(launch) if name == "devices" else [])


def _here(launch: Launch) -> str:
    """The name of this process in a row: its machine's, and its rank where a machine has several."""
    return platform.node() if launch.leads_machine else f"{platform.node()} rank {launch.rank}"


def _meet(context: Context) -> str | None:
    """Agree on a folder and a port for the children of a check; what is wrong, if that is not possible."""
    from blip2train.cli.doctor.disk import existing_parent

    agreed: list[Any] = []
    if context.launch.is_main:
        try:
            folder = tempfile.mkdtemp(prefix=".doctor-", dir=existing_parent(context.run_dir))
            agreed = [context.launch.address, free_port(), folder]
        except OSError as error:
            agreed = [str(error)]
    agreed = context.launch.from_main(agreed)
    if len(agreed) == 1:
        return str(agreed[0])
    context.meeting = Meeting(*agreed)
    Path(context.meeting.folder).mkdir(exist_ok=True)  # a disk of its own on another machine
    return None


def _part(context: Context) -> None:
    """Remove what the children wrote, once all of them have ended."""
    if context.meeting is not None and context.launch.leads_machine:
        shutil.rmtree(context.meeting.folder, ignore_errors=True)
    context.meeting = None


def _clocks(launch: Launch) -> list[Row]:
    """The clocks of all machines, read when they have just heard of each other."""
    from blip2train.cli.doctor.devices import judge_clocks

    launch.gather(0)
    times = dict(launch.gather([platform.node(), time.time()]))
    return [judge_clocks(times)] if len(times) > 1 else []
