"""What each signal means, when, and how often, in processes of their own."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

READY = "print('ready', flush=True)"
TRAINING = "stop.training = True"
STEPS = """
while not stop.wish:
    time.sleep(0.02)
print("stops for", stop.signal_name, flush=True)
sys.exit(stop.wish.exit_code)
"""
FOR_EVER = """
while True:
    time.sleep(0.02)
"""


def start(*parts: str) -> subprocess.Popen[str]:
    """A process that listens, says "ready" and goes on with the last of the parts."""
    lines = [*parts[:-1], READY, *parts[-1].strip().splitlines()]
    script = "import ctypes, os, sys, time\nfrom blip2train.callback import stop_signal\n"
    script += "stop_signal.LEAVE_SECONDS = 0.5\nwith stop_signal.StopSignal() as stop:\n"
    script += textwrap.indent("\n".join(lines), "    ")
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)], ids=["INT", "TERM", "USR1"]
)
def test_a_signal_before_training_leaves_with_its_code(number: int, code: int) -> None:
    process = start(FOR_EVER)
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == code and "leaving at once" in said


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGINT], 130),
        ([signal.SIGINT, signal.SIGINT], 130),  # one keystroke, passed on by a launcher
        ([signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM], 75),
        ([signal.SIGINT, signal.SIGTERM], 75),
    ],
    ids=["INT", "INT twice at once", "USR1 and TERM", "INT and TERM"],
)
def test_signals_in_training_are_noted_and_the_step_goes_on(numbers: list[int], code: int) -> None:
    process = start(
        TRAINING, "late = time.monotonic() + 0.5", "while time.monotonic() < late: time.sleep(0.02)" + STEPS
    )
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == code
    assert output == f"stops for {signal.Signals(numbers[0]).name}\n"


def test_ctrl_c_a_second_time_leaves_a_step_that_does_not_end() -> None:
    process = start(TRAINING, FOR_EVER)
    process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130 and "Ctrl-C once more leaves without one" in said


def test_sigterm_however_often_never_cuts_a_step_short() -> None:
    process = start(TRAINING, FOR_EVER)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.6)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_a_main_thread_inside_c_plus_plus_is_ended_from_outside() -> None:
    """A second thread hears and leaves: Python's handler cannot run there, and the C function starts again."""
    lock = "libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)"
    process = start(lock, "libc.pthread_mutex_lock(mutex)\nlibc.pthread_mutex_lock(mutex)")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 75


def test_a_forked_loader_worker_outlives_the_signals_of_the_job_but_not_its_parents_word() -> None:
    fork = "worker = os.fork()\nif not worker:\n    time.sleep(60)\nprint(worker, flush=True)\n"
    wait = "while not stop.wish: time.sleep(0.02)\ntime.sleep(0.3)\n"
    wait += "alive = os.waitpid(worker, os.WNOHANG) == (0, 0)\nos.kill(worker, 15)\n"
    wait += "print(alive, os.waitpid(worker, 0)[1], flush=True)"
    process = start(TRAINING, fork + wait)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    time.sleep(0.3)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(worker, number)
        process.send_signal(number)
    output, said = process.communicate(timeout=10)
    assert output == "True 0\n", said
