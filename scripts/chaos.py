"""Prove on your machines that a training survives the death of any of its processes: kill, repeat the command, compare.

    python scripts/chaos.py --kills 25 -- \\
        blip2train train experiment=microworld_stage1 trainer=ddp trainer.accelerator=cpu trainer.devices=2 ...
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 python scripts/chaos.py --kills 25 -- \\
        torchrun --standalone --nproc-per-node 2 --max-restarts 3 -m blip2train.cli.train experiment=... trainer=ddp ...

Any training command will do, as long as its processes run on this machine; `run_dir=` is added. It runs once
undisturbed. Then it runs again while random ranks get a SIGKILL at random moments: of the start, of the steps, and
every second one of the writing of a checkpoint. Whenever it has ended, the very same command is started anew, until it
is done. The finished weights must be the undisturbed run's, bit for bit. How long the other ranks took to notice is
measured, and those that outlive --patience are killed and counted. Take enough steps for all kills.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

MARK = "BLIP2TRAIN_CHAOS"
DEFAULT_RESULT = Path(__file__).parent / "benchmark" / "results" / "chaos.json"
AIMS = ("checkpoint", "start", "checkpoint", "steps")  # in turn
MOST_SECONDS_OF_STEPS, MOST_SECONDS_OF_WRITING = 8.0, 0.05
MOST_FAILURES = 3  # in a row that no kill explains


@dataclass
class Kill:
    """One SIGKILL and what came of it; seconds since the start of the command, or since the kill."""

    rank: int
    aim: str
    after_seconds: float
    logged_step: int
    writing_checkpoint: bool
    others_ended_after_seconds: float | None = None
    others_killed: int = 0


@dataclass
class Result:
    """All of a chaos run; `equal` is the verdict."""

    command: list[str]
    seed: int
    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    failures: int = 0
    undisturbed_seconds: float = 0.0
    first_step_seconds: float = 0.0
    chaos_seconds: float = 0.0
    steps: int = 0
    weights_sha256: dict[str, str] = field(default_factory=dict)
    equal: bool = False
    same_losses: bool = False


class Training:
    """One start of the command; its processes are known by a variable in their environment."""

    def __init__(self, command: list[str], run: Path, log: Path) -> None:
        self.run, self._mark = run, f"{MARK}={os.getpid()}-{run.name}-{time.monotonic_ns()}"
        name, value = self._mark.split("=", 1)
        self.begin = time.monotonic()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, f"run_dir={run}"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {name: value},
                start_new_session=True,
            )

    def processes(self) -> dict[int, dict[str, str]]:
        """Environments of all that belong to it and live, by process number."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                pairs = (folder / "environ").read_bytes().split(b"\0")
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if self._mark.encode() in pairs and state != "Z":
                text = (pair.decode(errors="replace").partition("=") for pair in pairs if pair)
                found[int(folder.name)] = {name: value for name, _, value in text}
        return found

    def ranks(self) -> dict[int, int]:
        """Process number by rank: those that a launcher gave a rank, and the command itself where it is rank 0."""
        living, found = self.processes(), {}
        for number, environment in living.items():
            parent = living.get(_parent(number), {})
            if "LOCAL_RANK" in environment and "LOCAL_RANK" not in parent:  # a loader's process has its rank's
                found[int(environment.get("RANK", environment["LOCAL_RANK"]))] = number
        if self.process.pid in living and not self.is_launcher():
            found.setdefault(0, self.process.pid)
        return found

    def is_launcher(self) -> bool:
        """Whether the command is torchrun, which starts its ranks anew by itself."""
        words = _command_line(self.process.pid)
        return any(Path(word).name == "torchrun" or word == "torch.distributed.run" for word in words)

    def note_state(self) -> None:
        """What lies half written now was left by a kill before; a start clears it late."""
        self._leftovers, self._record = self._half_written(), self._metrics()

    def is_writing(self) -> bool:
        now = self._half_written()
        self._leftovers &= now
        return bool(now - self._leftovers)

    def has_stepped(self) -> bool:
        return self._metrics() != self._record

    def _half_written(self) -> set[str]:
        return {path.name for path in (self.run / "checkpoints").glob(".step-*.partial")}

    def _metrics(self) -> tuple[int, int] | None:
        path = self.run / "metrics.jsonl"
        status = path.stat() if path.is_file() else None
        return (status.st_size, status.st_mtime_ns) if status else None

    def wait_until(self, condition: Callable[[], bool], seconds: float = float("inf")) -> None:
        """Until it is true, the command has ended, or so much time has passed."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end and not condition():
            time.sleep(0.001)

    def logged_step(self) -> int:
        rows = [_step_of_row(line) for line in _lines(self.run / "metrics.jsonl")]
        return max(rows, default=0)

    def wait_until_gone(self, numbers: set[int], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self.poll() and numbers & set(self.processes()):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def poll(self) -> bool:
        """Always true; takes notice of an end, so that the command does not stay as a zombie."""
        self.process.poll()
        return True

    def kill_all(self) -> int:
        numbers = set(self.processes())
        for number in numbers:
            _send_kill(number)
        self.process.wait()
        return len(numbers)


def wait_for_moment(training: Training, rng: random.Random, aim: str, starting: float) -> None:
    """Returns when a rank is to be killed, or the training has ended.

    Args:
        training: has just been started, or has just lost a rank.
        rng: draws the moment.
        aim: what it is to hit, one of AIMS.
        starting: seconds that a start takes until its first step.
    """
    training.note_state()
    share, to_pass = rng.random(), rng.randrange(3)
    if aim == "start":
        training.wait_until(training.has_stepped, share * starting)
    elif aim == "steps":
        training.wait_until(training.has_stepped)
        training.wait_until(lambda: False, share * MOST_SECONDS_OF_STEPS)
    else:
        for _ in range(to_pass):
            training.wait_until(training.is_writing)
            training.wait_until(lambda: not training.is_writing())
        training.wait_until(training.is_writing)
        time.sleep(share * MOST_SECONDS_OF_WRITING)


def disturb(training: Training, rng: random.Random, starting: float, patience: float, aim: str) -> Kill | None:
    """Kill one rank; None where the training ended before the moment came."""
    wait_for_moment(training, rng, aim, starting)
    ranks = training.ranks()
    if not ranks or training.process.poll() is not None:
        return None
    rank = rng.choice(sorted(ranks))
    kill = Kill(rank, aim, time.monotonic() - training.begin, training.logged_step(), training.is_writing())
    _send_kill(ranks[rank])
    others = set(ranks.values()) - {ranks[rank]}
    begin = time.monotonic()
    if training.wait_until_gone(others, patience):
        kill.others_ended_after_seconds = round(time.monotonic() - begin, 2)
    else:
        kill.others_killed = training.kill_all()
    return kill


def chaos(arguments: argparse.Namespace, result: Result, work: Path) -> None:
    """Start, kill and start again until the training is done."""
    rng, begin, failures = random.Random(arguments.seed), time.monotonic(), 0
    training: Training | None = None
    while True:
        if training is None:
            result.starts += 1
            training = Training(result.command, work / "chaos", work / "chaos.log")
        left = arguments.kills - len(result.kills)
        aim = AIMS[len(result.kills) % len(AIMS)]
        kill = disturb(training, rng, result.first_step_seconds, arguments.patience, aim) if left else None
        if kill is not None:
            result.kills.append(kill)
            say(f"kill {len(result.kills)}: {asdict(kill)}")
            training.begin = time.monotonic()
            if training.process.poll() is None:
                if training.is_launcher():
                    continue
                training.wait_until_gone({training.process.pid}, arguments.patience)
            training.kill_all()
            training = None
            continue
        code = training.process.wait()
        training.kill_all()
        training = None
        if code == 0:
            break
        failures += 1
        result.failures += 1
        if failures > MOST_FAILURES + len(result.kills):
            raise SystemExit(f"the command fails without being killed; see {work / 'chaos.log'}")
    result.chaos_seconds = round(time.monotonic() - begin, 1)


def compare(result: Result, work: Path) -> None:
    """The verdict: the last checkpoints' weights, and the losses on the way."""
    for name in ("undisturbed", "chaos"):
        last = max((work / name / "checkpoints").glob("step-*/model.safetensors"), key=lambda path: path.parent.name)
        result.weights_sha256[name] = hashlib.sha256(last.read_bytes()).hexdigest()
        result.steps = int(last.parent.name.removeprefix("step-"))
    result.equal = len(set(result.weights_sha256.values())) == 1
    result.same_losses = _losses(work / "undisturbed") == _losses(work / "chaos")


def summary(result: Result) -> str:
    """The verdict in a sentence."""
    noticed = [kill.others_ended_after_seconds or 0.0 for kill in result.kills]
    return (
        f"{len(result.kills)} kills, {sum(kill.writing_checkpoint for kill in result.kills)} of them while a "
        f"checkpoint was written; {result.starts} starts; the other ranks ended within {max(noticed, default=0.0)} s, "
        f"{sum(kill.others_killed > 0 for kill in result.kills)} times not by themselves; weights "
        f"{'EQUAL bit for bit' if result.equal else 'DIFFER'}, losses {'equal' if result.same_losses else 'DIFFER'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of ranks and moments")
    parser.add_argument("--patience", type=float, default=180.0, help="seconds that the other ranks have to notice")
    parser.add_argument("--work", type=Path, default=Path("outputs/chaos"), help="folder of both runs; must be new")
    parser.add_argument("--result", type=Path, default=DEFAULT_RESULT, help="JSON file")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- the training command")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    work = arguments.work.absolute()
    if not command or any(word.startswith("run_dir=") for word in command) or work.exists():
        parser.error(f"give -- and a training command without run_dir=, and a --work that is new (now {work})")
    work.mkdir(parents=True)
    result = Result(command, arguments.seed)
    say("the undisturbed run")
    whole = Training(command, work / "undisturbed", work / "undisturbed.log")
    while whole.process.poll() is None:
        if not result.first_step_seconds and whole.logged_step():
            result.first_step_seconds = round(time.monotonic() - whole.begin, 1)
        time.sleep(0.1)
    if whole.process.returncode != 0:
        raise SystemExit(f"the command fails undisturbed; see {work / 'undisturbed.log'}")
    result.undisturbed_seconds = round(time.monotonic() - whole.begin, 1)
    try:
        chaos(arguments, result, work)
        compare(result, work)
    finally:
        arguments.result.parent.mkdir(parents=True, exist_ok=True)
        arguments.result.write_text(json.dumps(asdict(result), indent=1) + "\n")
    say(summary(result))
    if len(result.kills) < arguments.kills:
        say(f"the run was done before all {arguments.kills} kills: give it more steps")
    sys.exit(0 if result.equal and result.same_losses and len(result.kills) == arguments.kills else 1)


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def _parent(number: int) -> int:
    try:
        return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _command_line(number: int) -> list[str]:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _send_kill(number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def _step_of_row(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # half a line of a process that was killed
        return 0


def _losses(run: Path) -> list[dict[str, float]]:
    rows = (json.loads(line) for line in _lines(run / "metrics.jsonl"))
    return [{name: value for name, value in row.items() if name == "step" or "loss" in name} for row in rows]


if __name__ == "__main__":
    main()
