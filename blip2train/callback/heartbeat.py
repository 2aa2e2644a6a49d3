"""What each rank writes down about itself every few seconds, and what the heartbeats of all say when none goes on.

One small file per rank, replaced atomically, so a shared file system is all that ranks of several machines need. Clocks
of machines are never compared: a reader judges by its own how long a file has not changed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blip2train import exit_code
from blip2train.run_dir import write_json

PHASES = ("start", "data", "forward", "backward", "optimizer", "after the step", "checkpoint", "end")
"""Of a batch, in order; `after the step` are the callbacks, which log and look after the run."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One rank at one moment.

    Args:
        rank: over all machines.
        host: name of its machine.
        pid: its process there.
        beat: counts up with every file written.
        step: optimizer steps done.
        batch: batches (micro-batches) done by this process.
        phase: one of `PHASES`.
        phase_seconds: how long it has been in it.
        left: exit code of a process that has ended on its own accord, else None.
        reason: why it ended.
    """

    rank: int
    host: str
    pid: int
    beat: int
    step: int
    batch: int
    phase: str
    phase_seconds: float
    left: int | None = None
    reason: str = ""

    @property
    def progress(self) -> tuple[int, int]:
        return self.batch, PHASES.index(self.phase)


def heartbeat_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def stack_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.stack.txt"


def write_heartbeat(folder: Path, heartbeat: Heartbeat) -> None:
    write_json(heartbeat_path(folder, heartbeat.rank), asdict(heartbeat))


def read_heartbeat(folder: Path, rank: int) -> Heartbeat | None:
    """The last one of a rank; None if it never wrote one, or one of another version."""
    try:
        return Heartbeat(**json.loads(heartbeat_path(folder, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def process_state(pid: int) -> str:
    """Of a process on this machine: `runs`, `stopped` (by SIGSTOP or a debugger) or `gone`."""
    with contextlib.suppress(OSError, IndexError):
        letter = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(letter, "runs")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        pass  # it is there, and another user's
    return "runs"


class Watch:
    """Reads the heartbeats of all ranks again and again, by one reader's clock.

    Args:
        folder: where they are.
        world: number of ranks.
        host: the reader's machine, whose processes it can see.
        silent_after: seconds without a new heartbeat after which a rank counts as silent.
    """

    def __init__(self, folder: Path, world: int, host: str, silent_after: float) -> None:
        self._folder, self._world, self._host, self._silent_after = folder, world, host, silent_after
        self._last: dict[int, Heartbeat] = {}
        self._changed: dict[int, float] = {}

    def look(self, now: float, *, final: bool = False) -> dict[int, str]:
        """Read all files.

        Args:
            now: by the reader's clock, in seconds.
            final: no other look follows: a stopped process is not given the time to go on.

        Returns:
            What is wrong by rank: `gone`, `stopped`, `silent`, `left` (with an error) or `never started`.
        """
        wrong = {}
        for rank in range(self._world):
            found = read_heartbeat(self._folder, rank)
            if found is not None and (rank not in self._last or found.beat != self._last[rank].beat):
                self._last[rank], self._changed[rank] = found, now
            state = self._state(rank, now, final)
            if state:
                wrong[rank] = state
        return wrong

    def _state(self, rank: int, now: float, final: bool) -> str:
        last = self._last.get(rank)
        since = now - self._changed.setdefault(rank, now)
        if last is not None and last.left is not None:
            return "left" if last.left else ""
        if last is not None and last.host == self._host:
            seen = process_state(last.pid)
            if seen == "gone":
                return "gone"
            if seen == "stopped" and final:
                return seen
            return "" if since <= self._silent_after else "stopped" if seen == "stopped" else "silent"
        return "" if since <= self._silent_after else "silent" if last is not None else "never started"

    def exit_code(self) -> int:
        """For the ranks that remain: an error that started again would only come again is passed on."""
        left = {beat.left for beat in self._last.values()}
        return next((code for code in (exit_code.USER_ERROR, exit_code.CRASHED) if code in left), exit_code.REQUEUE)

    def heartbeats(self) -> list[Heartbeat]:
        """The last known one of every rank that has written one."""
        return [self._last[rank] for rank in sorted(self._last)]


def report(heartbeats: Sequence[Heartbeat], wrong: dict[int, str], *, by_rank: int, seconds: float) -> dict[str, Any]:
    """Who keeps the others waiting.

    Args:
        heartbeats: the last ones of all ranks.
        wrong: as `Watch.look` returns it.
        by_rank: who reports.
        seconds: for how long that rank has completed no batch.

    Returns:
        Plain values for stuck.json; `text` is for people.
    """
    able = [beat for beat in heartbeats if beat.rank not in wrong]
    front = max((beat.progress for beat in able), default=None)
    behind = [beat.rank for beat in able if beat.progress != front]
    if not behind and len({beat.phase for beat in able}) == 1 and not wrong and able and able[0].phase == "data":
        behind = [beat.rank for beat in able]
    lines = [f"no batch was completed for {seconds:.0f} s, as rank {by_rank} sees it"]
    states = {beat.rank: "waits" for beat in able} | dict.fromkeys(behind, "behind") | wrong
    lines += [_line(beat, states[beat.rank]) for beat in heartbeats]
    lines += [f"  rank {rank}: never wrote a heartbeat" for rank in wrong if wrong[rank] == "never started"]
    lines.append(_verdict(wrong, behind))
    return {
        "by_rank": by_rank,
        "seconds": round(seconds, 1),
        "wrong": {str(rank): state for rank, state in sorted(wrong.items())},
        "behind": behind,
        "ranks": [asdict(beat) for beat in heartbeats],
        "text": "\n".join(lines),
    }


def _line(beat: Heartbeat, state: str) -> str:
    place = f"{beat.phase} of batch {beat.batch + 1}, step {beat.step}, for {beat.phase_seconds:.0f} s"
    return f"  rank {beat.rank} on {beat.host} (pid {beat.pid}): {state}; {place}"


def _verdict(wrong: dict[int, str], behind: list[int]) -> str:
    means = {
        "gone": "its process is gone (killed, or out of host memory: see dmesg)",
        "stopped": "its process is stopped (SIGSTOP or a debugger)",
        "silent": "its machine or process does not answer",
        "never started": "it has not started",
        "left": "it has ended by itself: see its message",
    }
    if wrong:
        return "; ".join(f"rank {rank} keeps the others waiting: {means[wrong[rank]]}" for rank in sorted(wrong))
    if behind:
        names = ", ".join(map(str, behind))
        return f"rank {names} keeps the others waiting: its stack.txt shows where it is"
    return "all ranks wait at the same place: look at the interconnect, and at the stack.txt files"
